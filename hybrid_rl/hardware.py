"""What a device, its links and the software around it take: the constants of `scale.py`.

Peaks are those of the vendors' data sheets (dense, without sparsity); shares of them and overheads of GPUs are
assumptions, of which none was measured on one by `benchmarks/scale.py`. Rates are in units of 1e9 bytes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid_rl.flops import peak_tflops
from hybrid_rl.settings import ConfigError


@dataclass(frozen=True)
class EngineOverheads:
    """Seconds of a rollout engine beside arithmetic and memory."""

    round: float
    """A round of decoding, whatever it holds: scheduling, in Python."""
    sequence: float
    """A sequence in a round: its part of scheduling and sampling."""
    layer: float
    """Launching a decoder layer's kernels."""
    adapter: float
    """Launching what stands beside a matrix."""
    request: float
    """Taking on a completion, and handing it back."""


@dataclass(frozen=True)
class Overheads:
    """Seconds of everything else that does not shrink with the model."""

    layer: float
    """Launching a decoder layer's kernels in the learner, forward; the backward pass takes twice that."""
    adapter: float
    """The same of what stands beside a matrix."""
    tensor: float
    """A trained tensor's gradient on its way, a micro-batch."""
    update: float
    """An optimizer step."""
    sync_tensor: float
    """A tensor of a weight update, from the learner to the receipt."""
    call: float
    """Calling a worker and having its answer: a step has a few such calls one after another."""
    reward: float
    """Judging a completion, in one process."""
    record: float
    """The driver's part of a completion: advantages, metrics, the file of rollouts."""
    engines: Mapping[str, EngineOverheads]
    """By `rollout.engine`."""


@dataclass(frozen=True)
class Hardware:
    """One device and its surroundings."""

    name: str
    peak_tflops: float
    """Of one device in the precision that is computed in."""
    matmul_share: float
    """Of that peak, what matrix products of thousands of tokens reach."""
    memory_gbs: float
    """Bandwidth of a device's memory."""
    memory_share: float
    """Of it, what reading weights and caches reaches."""
    activation_gbs: float
    """Bytes that element-wise kernels of the learner read and write a second."""
    link_gbs: float
    """What a device reaches in each direction to others of its node."""
    network_gbs: float
    """The same to other nodes, a device."""
    host_gbs: float
    """Between a device and the machine's memory."""
    encode_gbs: float
    """Trained weights that rank 0 compares, encodes and digests a second."""
    apply_gbs: float
    """The same that an engine writes, reads back and digests."""
    hop_seconds: float
    """Latency of a step of a collective operation."""
    per_node: int
    """Devices of a node."""
    memory_gib: float
    """Size of a device's memory."""
    overlaps: bool
    """Whether arithmetic runs beside loads, and kernels beside the launching of others: on a GPU."""
    overheads: Overheads = field(repr=False)

    def __post_init__(self) -> None:
        """Raises `ValueError` for what is no rate or no share."""
        for name in ("peak_tflops", "memory_gbs", "activation_gbs", "link_gbs", "network_gbs", "host_gbs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} must be above 0")
        for name in ("matmul_share", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} must be above 0 and at most 1")

    @property
    def flops(self) -> float:
        """Operations a second of large matrix products."""
        return self.peak_tflops * 1e12 * self.matmul_share

    @property
    def bandwidth(self) -> float:
        """Bytes of weights and caches read a second."""
        return self.memory_gbs * 1e9 * self.memory_share

    def bus(self, ranks: int) -> float:
        """Bytes a second that a ring of so many devices passes on: within a node its links, else also the nodes' ports,
        each ring of NCCL's going through another of them (its `busbw`)."""
        among = self.link_gbs
        return 1e9 * (among if ranks <= self.per_node else min(among, self.per_node * self.network_gbs))

    def collective(self, size: float, ranks: int, parts: int = 1) -> float:
        """Seconds in which `size` bytes went once round a ring of `ranks`, in so many `parts`: a reduce-scatter or an
        all-gather; an all-reduce is both (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002)."""
        if ranks == 1:
            return 0.0
        return (ranks - 1) / ranks * size / self.bus(ranks) + parts * (ranks - 1) * self.hop_seconds


_GPU_OVERHEADS = Overheads(
    layer=350e-6,
    adapter=40e-6,
    tensor=50e-6,
    update=0.02,
    sync_tensor=200e-6,
    call=2e-3,
    reward=200e-6,
    record=200e-6,
    engines={
        "vllm": EngineOverheads(round=1e-3, sequence=5e-6, layer=10e-6, adapter=2e-6, request=100e-6),
        "transformers": EngineOverheads(round=1e-3, sequence=20e-6, layer=500e-6, adapter=40e-6, request=100e-6),
    },
)

_DATA_SHEETS: Mapping[str, tuple[float, int, float, float, float]] = {
    # fp32 TFLOP/s; memory: GiB that are to be had, GB/s; GB/s in one direction to others of the node, to other nodes
    "H100": (67, 79, 3350, 450, 50),  # SXM5; https://www.nvidia.com/en-us/data-center/h100/
    "H200": (67, 140, 4800, 450, 50),  # https://www.nvidia.com/en-us/data-center/h200/
    "B200": (75, 179, 8000, 900, 50),  # https://www.nvidia.com/en-us/data-center/hgx/
    "A100": (19.5, 79, 2039, 300, 25),  # 80 GB SXM; https://www.nvidia.com/en-us/data-center/a100/
    "L40S": (91.6, 44, 864, 32, 12.5),  # PCIe 4.0; https://www.nvidia.com/en-us/data-center/l40s/
}
GPUS = tuple(_DATA_SHEETS)
"""Those that are known."""
_SHARE = 0.75
"""Of a link's or port's rate, what NCCL reaches with large messages."""


def gpu(name: str, dtype: str = "bfloat16") -> Hardware:
    """A known GPU, by what the device's name contains. Raises `ConfigError` for another."""
    known = next((each for each in GPUS if each.lower() in name.lower()), None)
    if known is None:
        raise ConfigError(f"{name!r} is no GPU that is known; use one of {', '.join(GPUS)}")
    single, size, memory, link, network = _DATA_SHEETS[known]
    return Hardware(
        name=known,
        peak_tflops=peak_tflops(known, dtype) or single,
        matmul_share=0.5,
        memory_gbs=memory,
        memory_share=0.6,
        activation_gbs=0.6 * memory,
        link_gbs=_SHARE * link,
        network_gbs=_SHARE * network,
        host_gbs=20,
        encode_gbs=4,
        apply_gbs=5,
        hop_seconds=5e-6,
        per_node=8,
        memory_gib=size,
        overlaps=True,
        overheads=_GPU_OVERHEADS,
    )


CPU = Hardware(
    name="a CPU core",
    peak_tflops=0.095,
    matmul_share=1.0,
    memory_gbs=59,
    memory_share=1.0,
    activation_gbs=11,
    link_gbs=1,
    network_gbs=1,
    host_gbs=10,
    encode_gbs=2.5,
    apply_gbs=5,
    hop_seconds=100e-6,
    per_node=2,
    memory_gib=12,
    overlaps=False,
    overheads=Overheads(
        layer=410e-6,
        adapter=45e-6,
        tensor=0.0,
        update=0.035,
        sync_tensor=105e-6,
        call=0.2e-3,
        reward=200e-6,
        record=180e-6,
        engines={
            "vllm": EngineOverheads(round=2.4e-3, sequence=87e-6, layer=0.0, adapter=45e-6, request=0.0),
            "transformers": EngineOverheads(round=5.3e-3, sequence=0.0, layer=280e-6, adapter=45e-6, request=0.0),
        },
    ),
)
"""One core in float32, workers in one process: matrix products, copies and overheads as `benchmarks/scale.py` found
them (benchmarks/RESULTS.md); links, encoding and applying are assumptions."""
