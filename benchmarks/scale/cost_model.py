"""What a step of GVPO in verl costs on GPUs: a model with its inputs stated, and the tables that it gives.

    python benchmarks/scale/cost_model.py        # prints the tables of docs/scale.md; no GPU and no package is needed

Nothing here is measured. A step is a sum of phases, each a quotient of work and rate: operations over the share of peak
that products reach, bytes over the share of bandwidth, and a ring's latency. Left out: stragglers, uneven lengths but
for the longest completion, the optimizer's own time, rewards, evaluation, checkpoints, failures. Inputs: inputs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil

from inputs import A100, FITTED, FITTED_GPU, GPU, H100, RECIPES, REPORTS, Assumptions, Model, Recipe, Workload

COUNTS = [2**power for power in range(11)]
WEAK_ROWS = 512
"""Rows a GPU in weak scaling."""


def row_flops(model: Model, tokens: float) -> float:
    """A forward pass over one row: 2 a weight and token, and causal attention's own two products."""
    products = 2 * (model.layers * model.layer_weights + model.head_weights) * tokens
    return products + 2 * model.layers * model.heads * model.head_size * tokens**2


def collective(size: float, gpus: int, gpu: GPU, a: Assumptions, pieces: int = 1) -> float:
    """Seconds of a ring over all GPUs that gathers, or reduces and scatters, tensors of `size` bytes in all."""
    if gpus == 1:
        return 0.0
    nodes = ceil(gpus / a.node)
    inside = size * (gpus - 1) / gpus / gpu.nvlink
    between = size * (nodes - 1) / nodes / (a.node * gpu.network)
    latency = a.base + (gpus - nodes) * a.hop + (nodes - 1) * a.far_hop
    return max(inside, between) / a.collective + pieces * latency


def training_pass(recipe: Recipe, gpu: GPU, gpus: int, a: Assumptions, rows: float, forwards: float) -> float:
    """Seconds of a pass over rows, those of all GPUs; forwards: its operations over a forward's, 1 = no gradients.

    FSDP gathers the weights in bf16 once a micro-batch, twice with gradients, and then reduces these in fp32.
    """
    model, work, mine = recipe.model, recipe.work, rows / gpus
    compute = mine * forwards * row_flops(model, work.row_tokens) / (gpu.flops * gpu.products)
    gather = collective(2 * model.weights, gpus, gpu, a, model.layers + 1)
    traffic = gather if forwards == 1 else 2 * gather + collective(4 * model.weights, gpus, gpu, a, model.layers + 1)
    traffic *= ceil(mine / work.micro_batch)
    return max(compute, traffic) + (1 - a.hidden) * min(compute, traffic)


def update_forwards(a: Assumptions) -> float:
    """Operations of an update over those of a forward pass: backward is two, checkpointing one more."""
    return 3 + a.checkpointing


def probed(work: Workload) -> int:
    """Mini-batches of a step that are scored once more: all but the first, whose log-ratios are 0."""
    return work.updates - 1


def kv_bytes(model: Model) -> int:
    """Of one token, keys and values in bf16."""
    return 2 * 2 * model.layers * model.kv_heads * model.head_size


def rollout(recipe: Recipe, gpu: GPU, gpus: int, a: Assumptions) -> float:
    """Every prompt read k times; then decode steps, in which weights and the sequences' KV cache are read.

    The last sequence starts when the others have left room, and is taken for the longest. Of reading and products the
    slower counts.
    """
    model, work, tp = recipe.model, recipe.work, min(recipe.tensor_parallel, gpus)
    rows = work.rows * tp / gpus
    read, flops = tp * gpu.bandwidth * a.decode_bandwidth, tp * gpu.flops
    room = tp * (a.engine_memory * gpu.memory - a.engine_reserve) - 2 * model.weights
    slots = min(a.sequences, rows, room // (kv_bytes(model) * (work.prompt_tokens + work.longest)))
    steps = work.longest + (rows - slots) * work.completion_tokens / slots
    context = work.prompt_tokens + work.completion_tokens / 2
    memory = (steps * 2 * model.weights + rows * work.completion_tokens * context * kv_bytes(model)) / read
    prompts = rows * row_flops(model, work.prompt_tokens)
    products = (rows * row_flops(model, work.row_tokens) - prompts) / (flops * a.decode_products)
    return prompts / (flops * gpu.products) + max(memory, products) + steps * a.decode_overhead


def group_bytes(work: Workload, k: int, a: Assumptions) -> float:
    """What a group adds to the rows that every rank gathers in a step: 8 bytes a column, an index, index and ratio."""
    return k * (8 * a.table_columns + 8 * work.epochs + 16 * probed(work) / work.mini_batches)


def gvpo(recipe: Recipe, gpu: GPU, gpus: int, a: Assumptions) -> float:
    """GVPO's own gathers; what a rank does with its rows; and the slopes, which each computes of all."""
    work = recipe.work
    share = work.rows / work.mini_batches
    gathers = collective(8 * a.table_columns * work.rows, gpus, gpu, a)
    gathers += work.updates * collective(8 * share, gpus, gpu, a)
    gathers += probed(work) * collective(16 * share, gpus, gpu, a)
    return gathers + work.updates * work.rows * a.slopes_row + work.rows / gpus * a.own_row


def step(recipe: Recipe, gpu: GPU, gpus: int, a: Assumptions) -> dict[str, float]:
    """Seconds of a step by phase."""
    work, model = recipe.work, recipe.model
    share = work.rows / work.mini_batches
    phases = {
        "rollout": rollout(recipe, gpu, gpus, a),
        "old log-probs": training_pass(recipe, gpu, gpus, a, work.rows, 1),
        "probe": probed(work) * training_pass(recipe, gpu, gpus, a, share, 1),
        "update": work.updates * training_pass(recipe, gpu, gpus, a, share, update_forwards(a)),
        "gvpo": gvpo(recipe, gpu, gpus, a),
        "weight sync": collective(4 * model.weights, gpus, gpu, a, model.layers + 1) + a.sync,
        "driver": work.rows * (a.driver_row + a.order_row),
    }
    if fit(recipe, gpu, gpus, a) == "offload":
        phases["offload"] = 2 * 12 * model.weights / gpus / a.host_link
    return phases


def memory(recipe: Recipe, gpu: GPU, gpus: int, a: Assumptions) -> dict[str, float]:
    """Bytes a GPU needs in training, and in rollouts with and without weights and optimizer on it.

    fp32 weights, gradients and two moments are sharded; beside them the root's and two layers' weights in bf16, what
    checkpoints and one layer keep for the backward pass, and logits.
    """
    model, work = recipe.model, recipe.work
    rows = min(work.micro_batch, max(1, work.rows / work.mini_batches / gpus))
    tokens = rows * work.row_tokens * a.spread
    gathered = 2 * (model.weights - model.layers * model.layer_weights + 2 * model.layer_weights)
    layer = 2 * (8 * model.hidden + 4 * model.inner)
    kept = model.layers * 2 * model.hidden + layer if a.checkpointing else model.layers * layer
    engine = a.engine_memory * gpu.memory
    return {
        "training": 16 * model.weights / gpus + gathered + tokens * (kept + model.vocabulary * a.logit_bytes),
        "rollout": 12 * model.weights / gpus + engine,
        "rollout, offloaded": engine,
    }


def fit(recipe: Recipe, gpu: GPU, gpus: int, a: Assumptions) -> str:
    """'fits', 'offload' (of weights and optimizer, while the engine runs), or 'no'."""
    needed = memory(recipe, gpu, gpus, a)
    if max(needed["training"], needed["rollout, offloaded"]) > gpu.memory:
        return "no"
    return "fits" if needed["rollout"] <= gpu.memory else "offload"


def scaling(
    recipe: Recipe, gpu: GPU, a: Assumptions, weak_rows: int | None = None
) -> list[tuple[int, float, dict[str, float], float, str]]:
    """GPUs, rows of each in a mini-batch, the step, its efficiency, the phase that costs it most; from 1 to 1,024 GPUs.

    Efficiency: GPU seconds a row, the least of all counts over this one's. Counts that do not hold the recipe, or leave
    a GPU without a row, are left out. weak_rows: rows a GPU, with as many prompts as that takes.
    """
    found = []
    for gpus in COUNTS:
        prompts = weak_rows * gpus // recipe.work.k if weak_rows else recipe.work.prompts
        now = replace(recipe, work=replace(recipe.work, prompts=prompts))
        mine = now.work.rows / now.work.mini_batches / gpus
        if mine >= 1 and fit(now, gpu, gpus, a) != "no":
            found.append((gpus, mine, step(now, gpu, gpus, a), gpus / now.work.rows))
    best = min(found, key=lambda one: sum(one[2].values()) * one[3])
    lines = []
    for gpus, mine, phases, scale in found:
        lost = {name: value * scale - best[2].get(name, 0.0) * best[3] for name, value in phases.items()}
        efficiency = sum(best[2].values()) * best[3] / (sum(phases.values()) * scale)
        lines.append((gpus, mine, phases, efficiency, max(lost, key=lost.__getitem__) if efficiency < 1 else ""))
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def inputs_table() -> str:
    things = [(gpu.name, gpu) for gpu in (H100, A100)]
    for recipe in RECIPES:
        things += [(recipe.model.name, recipe.model), (f"{recipe.name} ({recipe.note})", recipe.work)]
    values = {
        name: [f"{key} {value:.6g}" for key, value in vars(thing).items() if key != "name"] for name, thing in things
    }
    return table(["input", "values"], [[name, ", ".join(row)] for name, row in values.items()])


def recipes_table(a: Assumptions) -> str:
    rows = []
    for gpu in (H100, A100):
        for recipe in RECIPES:
            phases, needed = step(recipe, gpu, recipe.gpus, a), memory(recipe, gpu, recipe.gpus, a)
            seconds, gb = sum(phases.values()), [f"{value / 1e9:.0f}" for value in needed.values()]
            shown = ("rollout", "old log-probs", "probe", "update", "weight sync", "offload")
            row = [f"{recipe.name}: {recipe.gpus} {gpu.name}", *gb, fit(recipe, gpu, recipe.gpus, a)]
            row += [f"{phases.get(name, 0):.1f}" for name in shown] + [f"{phases['gvpo'] + phases['driver']:.2f}"]
            rows.append([*row, f"{seconds:.0f}", f"{seconds * recipe.work.steps / 3600:.1f}"])
    memories = ["GB in training", "in rollouts", "offloaded", "80 GB"]
    return table(["", *memories, *shown, "gvpo and driver", "step, s", "all steps, h"], rows)


def probe_table(recipe: Recipe, gpu: GPU, a: Assumptions) -> str:
    rows, epochs = [], (1, 2, 4)
    for parts in (1, 2, 4, 8, 16):
        row: list[object] = [parts]
        for count in epochs:
            work = replace(recipe.work, mini_batches=parts, epochs=count)
            phases = step(replace(recipe, work=work), gpu, recipe.gpus, a)
            of_step = phases["probe"] / (sum(phases.values()) - phases["probe"])
            row.append(f"{probed(work) / work.updates / update_forwards(a):.1%} / {of_step:.1%}")
        rows.append(row)
    return table(["mini-batches", *(f"{count} epochs" if count > 1 else "1 epoch" for count in epochs)], rows)


def bytes_table(recipe: Recipe, gpu: GPU, a: Assumptions) -> str:
    rows = []
    for k in (2, 4, 8, 16, 32):
        now = replace(recipe, work=replace(recipe.work, k=k))
        micro = now.work.updates * ceil(now.work.rows / now.work.mini_batches / now.gpus / now.work.micro_batch)
        sent, reduced = group_bytes(now.work, k, a) * now.work.prompts, micro * 4 * recipe.model.weights
        own = replace(a, slopes_row=0.0, own_row=0.0)
        cells = [
            f"{group_bytes(now.work, k, a):.0f}",
            f"{sent / 1e6:.2f}",
            f"{reduced / 1e9:,.0f}",
            f"{sent / reduced:.0e}",
        ]
        cells += [f"{1e3 * gvpo(now, gpu, gpus, own):.2f}" for gpus in (8, 64, 1024)]
        rows.append([k, *cells])
    times = [f"gathers at {gpus} GPUs, ms" for gpus in ("8", "64", "1,024")]
    return table(["k", "bytes a group", "all groups, MB", "gradients of the step, GB", "ratio", *times], rows)


def scaling_table(recipe: Recipe, gpu: GPU, a: Assumptions, weak_rows: int | None = None) -> str:
    rows = []
    open_traffic = {line[0]: line[3] for line in scaling(recipe, gpu, replace(a, hidden=0.0), weak_rows)}
    for gpus, mine, phases, efficiency, worst in scaling(recipe, gpu, a, weak_rows):
        parts = [f"{phases[name]:.1f}" for name in ("rollout", "probe", "update", "driver")]
        cells = [f"{sum(phases.values()):.1f}", *parts, f"{efficiency:.2f}", f"{open_traffic[gpus]:.2f}", worst]
        rows.append([f"{gpus:,}", f"{mine:g}", *cells])
    names = ["GPUs", "rows a GPU and mini-batch", "step, s", "rollout", "probe", "update", "driver"]
    return table([*names, "efficiency", "nothing hidden", "most is lost in"], rows)


def reports_table(a: Assumptions) -> str:
    """The model beside reports; none is of GVPO, and none has a probe."""
    rows = []
    for report in REPORTS:
        cells = []
        for gpu, assumed in ((report.gpu, a), (FITTED_GPU, FITTED)):
            phases = {**step(report.recipe, gpu, report.recipe.gpus, assumed), "probe": 0.0, "gvpo": 0.0}
            cells.append({**phases, "step": sum(phases.values())})
        for name, was in report.seconds.items():
            fitted = f"{cells[1][name]:.0f}" if report.gpu is A100 else ""
            rows.append([report.name, name, f"{was:.0f}", f"{cells[0][name]:.0f}", fitted])
    return table(["report", "phase", "reported, s", "model, s", "fitted to [log], s"], rows)


def main() -> None:
    a, main_recipe, small = Assumptions(), RECIPES[0], RECIPES[1]
    print("### Models, GPUs, workloads\n\n" + inputs_table())
    print("### Assumptions\n")
    print(table(["name", "value", "why"], [[f.name, f"{getattr(a, f.name):g}", f.metadata["why"]] for f in fields(a)]))
    print("### Recipes, seconds a step\n\n" + recipes_table(a))
    print("### The extra forward pass: over the update / over the rest of the step (7B, MATH, 8 H100)\n")
    print(probe_table(main_recipe, H100, a))
    print("### Bytes (7B, 1,024 prompts, 4 mini-batches, H100)\n\n" + bytes_table(main_recipe, H100, a))
    for recipe in (main_recipe, small):
        print(f"### Strong scaling: {recipe.name}, {recipe.work.rows:,} rows\n\n" + scaling_table(recipe, H100, a))
        print(
            f"### Weak scaling: {recipe.name}, {WEAK_ROWS} rows a GPU\n\n" + scaling_table(recipe, H100, a, WEAK_ROWS)
        )
    print("### Beside what others measured\n\n" + reports_table(a))


if __name__ == "__main__":
    main()
