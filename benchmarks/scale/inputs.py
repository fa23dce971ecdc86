"""What the cost model is fed: models, GPUs, recipes, and every number that is assumed, with its reason.

Sources in brackets; docs/scale.md has their addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Model:
    """A Llama-like decoder; inner: width of the feed-forward layer; tied: embedding and head are one matrix."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Of one layer: queries and output, keys and values, gate, up and down; biases and norms are left out."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_size * self.hidden
        return attention + 3 * self.hidden * self.inner

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        """All of them."""
        return self.layers * self.layer_weights + self.head_weights * (1 if self.tied else 2)


# config.json of the models, as in Lightning-AI/litgpt, litgpt/config.py.
MATH_7B = Model("Qwen2.5-Math-7B", 28, 3584, 28, 4, 128, 18944, 152064, tied=False)
MATH_1_5B = Model("Qwen2.5-Math-1.5B", 28, 1536, 12, 2, 128, 8960, 151936, tied=True)
LLAMA_8B = Model("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, tied=False)


@dataclass(frozen=True)
class GPU:
    """Peak rates: flops: bf16, dense; bandwidth: of its memory; nvlink, network: bytes/s in one direction, per GPU.

    products: share of flops that training reaches while nothing is waited for.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    products: float


# Datasheets; 85e9: what is usable of 80 GB. products: [torchtitan] has 33 to 39 % of an H100 under FSDP, what it
# recomputes not counted; the slope of [log] over tokens is 63 % of an A100 in forward passes, 74 % in updates.
H100 = GPU("H100 80GB SXM", 989e12, 85e9, 3.35e12, 450e9, 50e9, products=0.4)
A100 = GPU("A100 80GB SXM", 312e12, 85e9, 2.039e12, 300e9, 25e9, products=0.6)


@dataclass(frozen=True)
class Workload:
    """One step: prompts with k completions each, in mini-batches; longest: the batch's longest completion, tokens."""

    prompts: int
    k: int
    prompt_tokens: float
    completion_tokens: float
    longest: float
    mini_batches: int
    epochs: int
    steps: int
    micro_batch: int = 16

    @property
    def rows(self) -> int:
        return self.prompts * self.k

    @property
    def row_tokens(self) -> float:
        return self.prompt_tokens + self.completion_tokens

    @property
    def updates(self) -> int:
        """Mini-batches of a step, over all epochs."""
        return self.mini_batches * self.epochs


@dataclass(frozen=True)
class Recipe:
    """A run. tensor_parallel: GPUs of one rollout engine. note: where its numbers are from."""

    name: str
    model: Model
    work: Workload
    gpus: int
    tensor_parallel: int
    note: str


# The authors' script: 1,024 prompts, mini-batches of 256, 15 epochs, 1,024 + 1,024 tokens, 16 rows a micro-batch.
# prompt_tokens: [log], same data. completion_tokens: assumed; [log] has 216 to 620 for another model of that size.
_MATH = Workload(1024, 4, 100, 600, 1024, mini_batches=4, epochs=1, steps=15 * (7500 // 1024))
RECIPES = (
    Recipe("7B, MATH", MATH_7B, _MATH, 8, 2, "the paper's main table; its k, batch, lengths, epochs: the script's"),
    Recipe(
        "1.5B, MATH", MATH_1_5B, replace(_MATH, k=8), 2, 1, "the paper's ablations, k its own; the rest: the script's"
    ),
    Recipe(
        "7B, GSM8K + MATH",
        MATH_7B,
        replace(_MATH, completion_tokens=400, steps=15 * (14973 // 1024)),
        2,
        2,
        "the authors' script; its GPUs are not named",
    ),
)


def _assumed(value: float, why: str) -> float:
    return field(default=value, metadata={"why": why})


@dataclass(frozen=True)
class Assumptions:
    """Numbers that are no datasheet's."""

    checkpointing: float = _assumed(1, "gradient checkpointing: on in the script; 0: off")
    hidden: float = _assumed(1, "share of the shorter of traffic and compute that hides behind the other; [log]: 0")
    collective: float = _assumed(0.8, "share of a link's rate that a collective reaches; assumed")
    base: float = _assumed(8.4e-6, "s, a collective's start [NCCL, ring, Simple]")
    hop: float = _assumed(3.4e-6, "s, a step of a ring inside a node [NCCL, Simple]")
    far_hop: float = _assumed(9.6e-6, "s, a step of a ring between nodes [NCCL, Simple]")
    node: float = _assumed(8, "GPUs of a node")
    engine_memory: float = _assumed(
        0.6, "of the GPU's memory for the rollout engine: gpu_memory_utilization of the script"
    )
    engine_reserve: float = _assumed(4e9, "bytes of it that are neither weights nor KV cache; assumed")
    sequences: float = _assumed(256, "that an engine runs at once: max_num_seqs of verl 0.9.1")
    decode_bandwidth: float = _assumed(0.7, "of memory bandwidth: 31 ms a token for 145 GB on two H100 [72B]")
    decode_products: float = _assumed(
        0.25, "share of the GPU's flops in decode steps; slope of [log] over tokens: 0.21"
    )
    decode_overhead: float = _assumed(
        5e-3, "s, a decode step beside reading and products; assumed; 25 ms in [log], eager"
    )
    sync: float = _assumed(3.0, "s, waking the engine and loading weights, beside their way; [log]: 4.6 with it")
    host_link: float = _assumed(20e9, "bytes/s to host memory, where weights and optimizer are offloaded; assumed")
    driver_row: float = _assumed(45e-6, "s, a row on the driver: what a step of [log] leaves beside its phases")
    order_row: float = _assumed(1e-5, "s, a row, for group_order on the driver [measure.py]")
    slopes_row: float = _assumed(5e-7, "s, a row of the batch, for the slopes of a mini-batch [measure.py]")
    own_row: float = _assumed(3e-5, "s, a row of a GPU's own, copies and sums of a step, on one CPU core [measure.py]")
    table_columns: float = _assumed(5, "int64 a row, once: group, member, reward, reference log-prob, live")
    logit_bytes: float = _assumed(4, "a logit: bf16, and its gradient")
    spread: float = _assumed(1.25, "tokens of the largest micro-batch over the mean; assumed")


@dataclass(frozen=True)
class Report:
    """What others measured, to hold the model against. seconds: by phase."""

    name: str
    recipe: Recipe
    gpu: GPU
    seconds: dict[str, float]


def _logged(completion_tokens: float) -> Recipe:
    work = replace(_MATH, k=5, prompt_tokens=100.7, completion_tokens=completion_tokens)
    return Recipe("log", MATH_7B, work, 8, 2, "[log]; Qwen2-7B-Instruct has the shapes of Qwen2.5-Math-7B")


REPORTS = (
    Report(
        "[log], 216 tokens a completion",
        _logged(216.3),
        A100,
        {"rollout": 55.7, "old log-probs": 30.8, "update": 125.0, "step": 229.0},
    ),
    Report(
        "[log], 620 tokens a completion",
        _logged(620.4),
        A100,
        {"rollout": 109.9, "old log-probs": 50.5, "update": 191.6, "step": 374.6},
    ),
    Report(
        "[NeMo RL], 8B, 16 H100, on policy",
        Recipe("NeMo RL", LLAMA_8B, Workload(64, 32, 150, 910, 3946, 4, 1, 1), 16, 1, "prompt and k assumed"),
        H100,
        {"step": 97.7},
    ),
)
"""[log]'s GPU is not named; its share of peak, 0.244, makes the peak 306e12 FLOP/s: an A100 or A800."""

# What [log]'s times are like: per micro-batch a fixed time beside that of its tokens, and slow decode steps.
FITTED_GPU = replace(A100, name="A100 80GB, links of 30 GB/s", nvlink=30e9)
FITTED = replace(Assumptions(), hidden=0.0, collective=1.0, decode_overhead=25e-3, sequences=1024)
