"""A training on Google Kubernetes Engine: a JobSet manifest, or the xpk command that makes one.

    python launch/gke.py --name llama --image REGION-docker.pkg.dev/P/llmjax/llmjax --tpu v5p:4x4x4 --slices 2 \\
        --claim runs -- run --config configs/models/llama.py:llama3-8b --workdir /mnt/runs/llama

The image holds this repository in /llmjax, installed with the tpu (or gpu) extra. --claim is a PersistentVolumeClaim that
many pods may write, mounted at /mnt/runs: Filestore, or a bucket through its CSI driver. A pod that is preempted gets
SIGTERM, upon which all save; JobSet then starts all of them again, at most --restarts times, from the last checkpoint.
--gpus N instead of --tpu makes pods of N GPUs. --dry-run prints the manifest; --xpk uses xpk instead of kubectl.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
from common import scalar

MOUNT = "/mnt/runs"


@dataclass(frozen=True)
class Tpu:
    """How GKE calls a generation of TPUs: its node label, xpk's name, chips of a host in slices of several hosts."""

    label: str
    xpk: str
    chips: int
    single: int  # the most chips that one host can have
    cores: int  # by which xpk's name counts, for each chip


# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
TPUS = {
    "v4": Tpu("tpu-v4-podslice", "v4", 4, 4, 2),
    "v5e": Tpu("tpu-v5-lite-podslice", "v5litepod", 4, 8, 1),
    "v5p": Tpu("tpu-v5p-slice", "v5p", 4, 4, 2),
    "v6e": Tpu("tpu-v6e-slice", "v6e", 4, 8, 1),
}

MANIFEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations: {annotations}
spec:
  failurePolicy:
    maxRestarts: {restarts}
    rules:
      - action: FailJobSet  # a mistake to mend is not tried again
        onJobFailureReasons: ["PodFailurePolicy"]
  replicatedJobs:
    - name: slice
      replicas: {slices}
      template:
        spec:
          parallelism: {hosts}
          completions: {hosts}
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: llmjax
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: {grace}
              hostNetwork: {host_network}
              dnsPolicy: {dns}
              nodeSelector: {selector}
              containers:
                - name: llmjax
                  image: {image}
                  workingDir: /llmjax
                  command: {command}
                  env: {env}
                  ports:
                    - containerPort: {port}
                  resources:
                    limits: {limits}
                  volumeMounts:
                    - name: runs
                      mountPath: {mount}
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: {claim}
"""


def chips_and_hosts(tpu: str) -> tuple[Tpu, str, int, int]:
    """Of TYPE:TOPOLOGY, such as v5p:4x4x4: the generation, the topology, chips of a host and hosts of a slice."""
    kind, _, topology = tpu.partition(":")
    try:
        chips = math.prod(int(size) for size in topology.split("x"))
        generation = TPUS[kind]
    except (KeyError, ValueError):
        raise common.Mistake(
            f"--tpu={tpu}: write TYPE:TOPOLOGY such as v5p:4x4x4; types are {', '.join(TPUS)}"
        ) from None
    per_host = chips if chips <= generation.single else generation.chips
    if chips % per_host:
        raise common.Mistake(f"--tpu={tpu}: {chips} chips are no whole number of hosts with {per_host}")
    return generation, topology, per_host, chips // per_host


def manifest(args: argparse.Namespace, command: Sequence[str]) -> str:
    """The JobSet as YAML."""
    if args.tpu:
        generation, topology, chips, hosts = chips_and_hosts(args.tpu)
        selector = {
            "cloud.google.com/gke-tpu-accelerator": generation.label,
            "cloud.google.com/gke-tpu-topology": topology,
        }
        limits = {"google.com/tpu": chips}
        env = {"LLMJAX_CLUSTER": "tpu"}  # JAX finds the hosts and the slices itself
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    else:
        hosts, limits = args.nodes, {"nvidia.com/gpu": args.gpus}
        selector = {"cloud.google.com/gke-accelerator": args.accelerator}
        # The pod's number comes from Kubernetes: JOB_COMPLETION_INDEX.
        env = {
            "LLMJAX_COORDINATOR": f"{args.name}-slice-0-0.{args.name}:{common.PORT}",
            "LLMJAX_PROCESSES": str(hosts),
        }
        annotations = {}
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    return MANIFEST.format(
        name=scalar(args.name),
        restarts=args.restarts,
        slices=args.slices,
        hosts=hosts,
        grace=args.grace,
        selector=scalar(selector),
        image=scalar(args.image),
        command=scalar(["python", "-m", "llmjax", *command]),
        env=scalar([{"name": name, "value": value} for name, value in (env | common.STOPPED).items()]),
        annotations=scalar(annotations),
        host_network=scalar(bool(args.tpu)),
        dns="ClusterFirstWithHostNet" if args.tpu else "ClusterFirst",
        port=common.PORT,
        limits=scalar(limits),
        mount=MOUNT,
        claim=scalar(args.claim),
    )


def xpk(args: argparse.Namespace, command: Sequence[str]) -> list[str]:
    """The xpk command; its cluster's storage must be mounted at /mnt/runs (xpk storage attach)."""
    generation, _, chips, hosts = chips_and_hosts(args.tpu)
    words = common.line(["python", "-m", "llmjax", *command], env={"LLMJAX_CLUSTER": "tpu", **common.STOPPED})
    return [
        "xpk", "workload", "create", f"--cluster={args.cluster}", f"--workload={args.name}",
        f"--tpu-type={generation.xpk}-{chips * hosts * generation.cores}", f"--num-slices={args.slices}",
        f"--docker-image={args.image}", f"--max-restarts={args.restarts}", f"--command=cd /llmjax && {words}",
        f"--termination-grace-period-seconds={args.grace}", *(["--spot"] if args.spot else []),
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Apply the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--image", required=True, help="with this repository in /llmjax")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tpu", default="", help="TYPE:TOPOLOGY of a slice, such as v5p:4x4x4 or v5e:16x16")
    which.add_argument("--gpus", type=int, default=0, help="of each pod")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices")
    parser.add_argument("--nodes", type=int, default=1, help="pods with GPUs")
    parser.add_argument("--accelerator", default="nvidia-h100-80gb", help="the node label of GPUs")
    parser.add_argument("--claim", default="runs", help=f"PersistentVolumeClaim that is mounted at {MOUNT}")
    parser.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away")
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--grace", type=int, default=300, help="seconds to save in, when a pod is to go")
    parser.add_argument("--xpk", action="store_true", help="use xpk instead of kubectl")
    parser.add_argument("--cluster", default="", help="xpk's cluster")
    parser.add_argument("--yes", action="store_true", help="do not ask, though it costs money")
    args, command = common.parse(parser, argv)
    if not common.workdir(command).startswith(f"{MOUNT}/"):
        raise common.Mistake(f"--workdir must be below {MOUNT}, the volume that all pods see")
    if args.xpk and not (args.tpu and args.cluster):
        raise common.Mistake("--xpk needs --tpu and --cluster")
    text = "" if args.xpk else manifest(args, command)
    apply = xpk(args, command) if args.xpk else ["kubectl", "apply", "-f", "-"]
    if args.dry_run:
        print(text + ("" if args.xpk else "# ") + common.line(apply))
        return 0
    common.approve(f"{args.slices} x {args.tpu or f'{args.nodes} pods of {args.gpus} GPUs'}", yes=args.yes)
    common.call(apply, stdin=text or None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
