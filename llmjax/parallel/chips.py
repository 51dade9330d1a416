"""What accelerators can do: the one table of published constants, which MFU and `llmjax plan` both read.

Every number is of one chip, as its maker counts chips, in bytes, bytes/s, FLOP/s, watts and US dollars an hour, and
`sources` says where each is from. What no maker publishes is marked "assumed".
"""

from dataclasses import dataclass

GIB = 2**30
GB = 1e9
DOCS = "docs.cloud.google.com/tpu/docs"
GCP = "Google Cloud's list price on demand, 2025"
BLOCKS = "AWS EC2 Capacity Blocks, effective rate of one accelerator, US East (Ohio), 2024-12"
COMPILER = "the limit in a refusal of libtpu 0.0.42.1's compiler"
GPU_SHARE = "assumed: 92% of the memory, the rest being CUDA's context, NCCL's buffers and fragments"
UNPUBLISHED = "assumed: the maker publishes none"


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator."""

    name: str
    kind: str  # how jax's device_kind begins
    flops: float  # dense bfloat16 FLOP/s
    memory: float  # bytes of HBM
    usable: float  # bytes of it that a program may use
    bandwidth: float  # of HBM, bytes/s
    links: int  # TPU: links to neighbours; GPU: 1, the switch inside a node
    link: float  # bytes/s of one link, each way
    node: int  # chips that the links join; 0: the whole slice, as a torus
    network: float  # bytes/s of a chip, each way, between nodes or slices
    watts: float
    price: float  # US dollars a chip-hour; 0: not known
    sources: dict[str, str]
    devices: int = 1  # that JAX shows for a chip
    cycle_flops: int = 0  # FLOPs of all matrix units in a clock cycle; 0: not known

    @property
    def torus(self) -> int:
        """Dimensions of the torus of links; 0: none, a switch."""
        return self.links // 2 if self.node == 0 else 0

    @property
    def clock(self) -> float:
        """Cycles a second, from the peak and the FLOPs of a cycle; 0: not known."""
        return self.flops / self.cycle_flops if self.cycle_flops else 0.0


def _tpu(page: str, **more: str) -> dict[str, str]:
    said = dict.fromkeys(("flops", "memory", "bandwidth", "links", "link", "network", "cycle_flops"), f"{DOCS}/{page}")
    return said | {"usable": COMPILER, "watts": UNPUBLISHED, "price": GCP} | more


def _gpu(sheet: str, system: str, price: str) -> dict[str, str]:
    said = dict.fromkeys(
        ("flops", "memory", "bandwidth", "links", "link", "watts"), f"NVIDIA {sheet} data sheet, dense"
    )
    return said | {"usable": GPU_SHARE, "network": system, "price": price}


# A TPU's links: its bidirectional bandwidth, halved, over six (3-D torus) or four (2-D torus) of them.
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        "TPU v4", "TPU v4", 275e12, 32 * GIB, 30.75 * GIB, 1228 * GB, 6, 50 * GB, 0, 6.25 * GB, 192, 3.22,
        _tpu("v4", link="2,400 Gb/s a chip over six links, TPU v4's paper (Jouppi et al. 2023)",
             network="assumed: as v5p's", watts=f"{DOCS}/v4, the largest measured"),
        cycle_flops=8 * 128 * 128 * 2,
    ),
    "v5e": Chip(
        "TPU v5e", "TPU v5 lite", 197e12, 16 * GIB, 15.75 * GIB, 819 * GB, 4, 50 * GB, 0, 3.125 * GB, 200, 1.20,
        _tpu("v5e"), cycle_flops=4 * 128 * 128 * 2,
    ),
    "v5p": Chip(
        "TPU v5p", "TPU v5", 459e12, 95 * GIB, 95.74 * GIB, 2765 * GB, 6, 100 * GB, 0, 6.25 * GB, 450, 4.20,
        _tpu("v5p"), cycle_flops=8 * 128 * 128 * 2,
    ),
    "v6e": Chip(
        "TPU v6e", "TPU v6 lite", 918e12, 32 * GIB, 31.25 * GIB, 1638 * GB, 4, 100 * GB, 0, 12.5 * GB, 300, 2.70,
        _tpu("v6e", cycle_flops="four matrix units of 256 x 256"), cycle_flops=4 * 256 * 256 * 2,
    ),
    "tpu7x": Chip(
        "TPU7x", "TPU7x", 2307e12, 192 * GIB, 189.5 * GIB, 7380 * GB, 6, 100 * GB, 0, 12.5 * GB, 1000, 0.0,
        _tpu("tpu7x"), devices=2,
    ),
    "a100": Chip(
        "A100 80GB", "NVIDIA A100", 312e12, 80 * GB, 73.6 * GB, 2039 * GB, 1, 300 * GB, 8, 25 * GB, 400, 5.07,
        _gpu("A100", "DGX A100: eight 200 Gb/s adapters for eight GPUs", f"{GCP} (a2-ultragpu)"),
    ),
    "a100-40gb": Chip(
        "A100 40GB", "NVIDIA A100", 312e12, 40 * GB, 36.8 * GB, 1555 * GB, 1, 300 * GB, 8, 6.25 * GB, 400, 1.84,
        _gpu("A100", "AWS p4d: 400 Gb/s for eight GPUs", BLOCKS),
    ),
    "h100": Chip(
        "H100 SXM", "NVIDIA H100", 989e12, 80 * GB, 73.6 * GB, 3350 * GB, 1, 450 * GB, 8, 50 * GB, 700, 4.92,
        _gpu("H100", "DGX H100: eight 400 Gb/s adapters for eight GPUs", BLOCKS),
    ),
    "h200": Chip(
        "H200 SXM", "NVIDIA H200", 989e12, 141 * GB, 129.7 * GB, 4800 * GB, 1, 450 * GB, 8, 50 * GB, 700, 5.41,
        _gpu("H200", "DGX H200: eight 400 Gb/s adapters for eight GPUs", BLOCKS),
    ),
    "b200": Chip(
        "B200 SXM", "NVIDIA B200", 2250e12, 180 * GB, 165.6 * GB, 8000 * GB, 1, 900 * GB, 8, 50 * GB, 1000, 0.0,
        _gpu("DGX B200", "DGX B200: eight 400 Gb/s adapters for eight GPUs", ""),
    ),
}  # fmt: skip


def of_device_kind(kind: str) -> Chip | None:
    """The chip of which JAX says this `device_kind`, or None."""
    return max((c for c in CHIPS.values() if kind.startswith(c.kind)), key=lambda c: len(c.kind), default=None)
