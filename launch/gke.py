"""Train on Google Kubernetes Engine: write a JobSet manifest and hand it to kubectl.

    python launch/gke.py --name llama --image REGION-docker.pkg.dev/P/llmjax/llmjax --tpu v5p:4x4x4 --slices 2 \\
        --claim runs -- run --config configs/models/llama.py:llama3-8b --workdir /mnt/runs/llama

The image holds this repository in /llmjax, installed with the tpu (or gpu) extra; launch/Dockerfile makes it. --claim names
a PersistentVolumeClaim that many pods may write, mounted at /mnt/runs: Filestore, or a bucket through its CSI driver. A
preempted pod gets SIGTERM and all pods save; JobSet then starts all of them again from the last checkpoint, at most
--restarts times. --gpus N instead of --tpu makes pods of N GPUs. --dry-run prints the manifest.

A pod on a spot node has 15 seconds to save, whatever its manifest says. Node pools of GKE 1.35 and later can be made with up
to 120: say so with --grace. What was not saved in that time is done again from the last checkpoint, so save often
(checkpoint.every_seconds). `llmjax plan` says how large a checkpoint is.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import jobs
from jobs import scalar

MOUNT = "/mnt/runs"
SPOT = "cloud.google.com/gke-spot"
# cloud.google.com/kubernetes-engine/docs/concepts/spot-vms: of a pod that is no part of the system
SPOT_SECONDS, LONGEST_SPOT_SECONDS = 15, 120


@dataclass(frozen=True)
class Tpu:
    """A generation of TPUs on GKE."""

    label: str  # of its nodes
    chips: int  # of a host in a slice of several hosts
    single: int  # chips of a host that is a slice alone, at most


# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
TPUS = {
    "v4": Tpu("tpu-v4-podslice", 4, 4),
    "v5e": Tpu("tpu-v5-lite-podslice", 4, 8),
    "v5p": Tpu("tpu-v5p-slice", 4, 4),
    "v6e": Tpu("tpu-v6e-slice", 4, 8),
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
      - action: FailJobSet  # do not try a user's mistake again
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
              tolerations: {tolerations}
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
    """(generation, topology, chips of a host, hosts of a slice) of TYPE:TOPOLOGY, such as v5p:4x4x4."""
    kind, _, topology = tpu.partition(":")
    try:
        chips = math.prod(int(size) for size in topology.split("x"))
        generation = TPUS[kind]
    except (KeyError, ValueError):
        raise jobs.Mistake(f"--tpu={tpu}: write TYPE:TOPOLOGY such as v5p:4x4x4; types are {', '.join(TPUS)}") from None
    per_host = chips if chips <= generation.single else generation.chips
    if chips % per_host:
        raise jobs.Mistake(f"--tpu={tpu}: {chips} chips are not a whole number of hosts with {per_host} chips")
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
            "LLMJAX_COORDINATOR": f"{args.name}-slice-0-0.{args.name}:{jobs.PORT}",
            "LLMJAX_PROCESSES": str(hosts),
        }
        annotations = {}
    tolerations = []
    if args.spot:
        selector[SPOT] = "true"
        tolerations = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if args.reservation:
        selector["cloud.google.com/reservation-name"] = args.reservation
    return MANIFEST.format(
        name=scalar(args.name),
        restarts=args.restarts,
        slices=args.slices,
        hosts=hosts,
        grace=args.grace or (SPOT_SECONDS if args.spot else 300),
        tolerations=scalar(tolerations),
        selector=scalar(selector),
        image=scalar(args.image),
        command=scalar(["python", "-m", "llmjax", *command]),
        env=scalar([{"name": name, "value": value} for name, value in (env | jobs.STOPPED).items()]),
        annotations=scalar(annotations),
        host_network=scalar(bool(args.tpu)),
        dns="ClusterFirstWithHostNet" if args.tpu else "ClusterFirst",
        port=jobs.PORT,
        limits=scalar(limits),
        mount=MOUNT,
        claim=scalar(args.claim),
    )


def main(argv: Sequence[str]) -> int:
    """Apply the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the JobSet")
    parser.add_argument("--image", required=True, help="image with this repository in /llmjax")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tpu", default="", help="TYPE:TOPOLOGY of a slice, such as v5p:4x4x4 or v5e:16x16")
    which.add_argument("--gpus", type=int, default=0, help="GPUs of each pod")
    parser.add_argument("--slices", type=int, default=1, help="number of TPU slices")
    parser.add_argument("--nodes", type=int, default=1, help="number of pods with GPUs")
    parser.add_argument("--accelerator", default="nvidia-h100-80gb", help="node label of the GPUs")
    parser.add_argument("--claim", default="runs", help=f"PersistentVolumeClaim to mount at {MOUNT}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--spot", action="store_true", help="use cheaper machines that may be preempted")
    which.add_argument("--reservation", default="", metavar="NAME", help="take the machines of this reservation")
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument(
        "--grace", type=int, default=0, help="seconds to save before a pod is removed (default: 300; with --spot 15)"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before something that costs money")
    args, command = jobs.parse(parser, argv)
    if not jobs.workdir(command).startswith(f"{MOUNT}/"):
        raise jobs.Mistake(f"--workdir must be below {MOUNT}, the volume that all pods see")
    if args.spot and args.grace > LONGEST_SPOT_SECONDS:
        raise jobs.Mistake(
            f"--grace {args.grace}: a pod on a spot node has {SPOT_SECONDS} seconds, or up to {LONGEST_SPOT_SECONDS} where its "
            "node pool was made so"
        )
    text, apply = manifest(args, command), ["kubectl", "apply", "-f", "-"]
    if args.dry_run:
        print(f"{text}# {jobs.line(apply)}")
        return 0
    jobs.approve(f"{args.slices} x {args.tpu or f'{args.nodes} pods of {args.gpus} GPUs'}", yes=args.yes)
    jobs.call(apply, stdin=text)
    return 0


if __name__ == "__main__":
    sys.exit(jobs.each(main, sys.argv[1:]))
