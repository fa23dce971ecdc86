"""One rank of a training step of verl's own worker and engine, against plain gradients of whole groups.

python engine_process.py MODEL_FOLDER '{"rank": 0, "ranks": 2, "port": 29500, ...}'

Prints the largest difference of any gradient of any step from a plain loop that takes the same steps with the objective
of the definition, computed on whole groups without verl.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

folder, case = sys.argv[1], json.loads(sys.argv[2])
rank, ranks = case["rank"], case["ranks"]
os.environ |= {
    "RANK": str(rank),
    "WORLD_SIZE": str(ranks),
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(case["port"]),
}

import torch  # noqa: E402

torch.set_num_threads(1)

import verl  # noqa: E402, F401
import verl_on_cpu  # noqa: E402, F401
from tensordict import TensorDict  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers import engine_workers  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.utils.losses import ppo_loss  # noqa: E402

import gvpo.integrations.verl.worker as worker_module  # noqa: E402
import gvpo.objective.rows as rows_module  # noqa: E402
from gvpo.integrations.verl import GVPOPolicyLossConfig  # noqa: E402

BETA, RATE, VOCABULARY = 0.1, 0.05, 73
REFERENCE = case.get("reference", "old")


def make_rows() -> list[dict]:
    """Completions of ragged groups in an order of their own, with log-ratios of several nats to their old log-probs."""
    numbers = torch.Generator().manual_seed(7)

    def some(least: int, most: int) -> int:
        return int(torch.randint(least, most, (1,), generator=numbers))

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(2, VOCABULARY, (count,), generator=numbers)

    rows = []
    for group, size in enumerate(case["groups"]):
        prompt = tokens(some(3, 8))
        for member in range(size):
            parts = case.get("parts", 1) if member == 0 else 1
            reward = float(torch.rand((), generator=numbers))
            for _ in range(parts):
                answer = tokens(some(4, 12))
                mask = torch.ones(len(answer), dtype=torch.long)
                mask[1 : 1 + member % 3] = 0  # a tool's tokens
                rows.append(
                    {
                        "uid": f"group {group}",
                        "session_id": member,
                        "prompt": prompt,
                        "answer": answer,
                        "reward": reward,
                        "old": -4 + torch.randn(len(answer), generator=numbers),
                        "ref": -4 + torch.randn(len(answer), generator=numbers),
                        "mask": mask,
                    }
                )
    for number in range(-len(rows) % (ranks * case["mini_batches"] * case["micro_batch"])):
        padding = {"uid": "padding", "session_id": number, "prompt": tokens(3), "answer": tokens(1), "reward": 0.0}
        zero = torch.zeros(1)
        rows.append(padding | {"old": zero, "ref": zero, "mask": torch.zeros(1, dtype=torch.long)})
    for row in case.get("rejected", []):
        rows[row]["drawn"], rows[row]["mask"] = rows[row]["mask"], torch.zeros_like(rows[row]["mask"])
    order = torch.randperm(len(rows), generator=numbers).tolist() if case["scattered"] else range(len(rows))
    return [rows[place] for place in order]


def as_batch(rows: list[dict]) -> TensorDict:
    """As verl's driver sends it."""

    def ragged(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    ids = [torch.cat([row["prompt"], row["answer"]]) for row in rows]
    rewards = [torch.zeros(len(row["answer"])) for row in rows]
    for reward, row in zip(rewards, rows, strict=True):
        reward[-1] = row["reward"]
    fields = {
        "prompts": [row["prompt"] for row in rows],
        "responses": [row["answer"] for row in rows],
        "input_ids": ids,
        "position_ids": [torch.arange(len(one)) for one in ids],
        "response_mask": [row["mask"] for row in rows],
        "loss_mask": [row.get("drawn", row["mask"]) for row in rows],
        "old_log_probs": [row["old"] for row in rows],
        "ref_log_prob": [row["ref"] for row in rows],
        # What GVPO does not look at.
        "advantages": [torch.full_like(row["old"], 17.0) for row in rows],
        "rm_scores": rewards,
    }
    batch = TensorDict({name: ragged(values) for name, values in fields.items()}, batch_size=[len(rows)])
    tu.assign_non_tensor_stack(batch, "uid", [row["uid"] for row in rows])
    tu.assign_non_tensor_stack(batch, "session_id", [row["session_id"] for row in rows])
    tu.assign_non_tensor(batch, temperature=1.0, calculate_entropy="entropy" in case)
    return batch


def make_worker():
    """verl's own, with this plug-in's class."""
    micro_batch = case["micro_batch"]
    model = HFModelConfig(
        path=folder,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"},
    )
    engine = FSDPEngineConfig(
        forward_only=False,
        strategy="fsdp2",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_dynamic_bsz=case["dynamic"],
        max_token_len_per_gpu=60,
        micro_batch_size_per_gpu=micro_batch,
        infer_max_token_len_per_gpu=60,
        infer_micro_batch_size_per_gpu=micro_batch,
        use_torch_compile=False,
    )
    optimizer = FSDPOptimizerConfig(
        optimizer="SGD",
        optimizer_impl="torch.optim",
        lr=RATE,
        weight_decay=0.0,
        betas=None,
        clip_grad=1e9,
        total_training_steps=10,
        override_optimizer_config=None,
    )
    worker = engine_workers.ActorRolloutRefWorker.actor_worker_cls(
        config=TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=optimizer,
            checkpoint_config=None,
        )
    )
    worker.reset()
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=micro_batch,
        policy_loss=GVPOPolicyLossConfig(loss_mode="gvpo", gvpo_beta=BETA, gvpo_reference=REFERENCE),
        use_kl_loss="kl" in case,
        kl_loss_coef=case.get("kl", 0.0),
        entropy_coeff=case.get("entropy", 0.0),
        kl_loss_type="mse",
        use_dynamic_bsz=case["dynamic"],
        loss_agg_mode=case.get("loss_agg_mode", "token-mean"),
    )
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def plain_steps(rows: list[dict], shuffled: list[set[int]]) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Gradients and losses of the same steps, by the definition: whole groups in one graph, those elsewhere detached.

    shuffled: the mini-batches, where verl drew them.

    Mini-batch m is made of the m-th slice of every rank's rows. A group that lies in it in part counts as that part.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    mine, parts = len(rows) // ranks, case["mini_batches"]
    size, losses, gradients = mine // parts, [], []
    groups: dict[str, list[int]] = {}
    rejected = {(row["uid"], row["session_id"]) for row in rows if "drawn" in row}
    for place, row in enumerate(rows):
        if row["mask"].any() and (row["uid"], row["session_id"]) not in rejected:
            groups.setdefault(row["uid"], []).append(place)

    def logps_of(row: dict) -> torch.Tensor:
        ids = torch.cat([row["prompt"], row["answer"]])[None]
        return model(ids).logits[0].log_softmax(-1)[len(row["prompt"]) - 1 : -1]

    def log_ratios(row: dict, reference: str) -> torch.Tensor:
        logps = logps_of(row)
        return (logps.gather(-1, row["answer"][:, None])[:, 0].double() - row[reference])[row["mask"].bool()]

    def log_ratio(row: dict) -> torch.Tensor:
        return log_ratios(row, REFERENCE).sum()

    if case.get("on_policy"):
        with torch.no_grad():
            for row in rows:
                row["old"] = torch.zeros_like(row["old"])
                row["old"][0] = log_ratio(row).float()
    for _ in range(case["epochs"]):
        for part in range(parts):
            here = {rank * mine + part * size + row for rank in range(ranks) for row in range(size)}
            if case.get("shuffle"):
                here = shuffled.pop(0)
            total, count, seen = torch.zeros((), dtype=torch.float64), 0.0, []
            for places in groups.values():
                members: dict[int, torch.Tensor] = {}
                rewards: dict[int, float] = {}
                for place in places:
                    ratio = log_ratio(rows[place])
                    session = rows[place]["session_id"]
                    members[session] = members.get(session, 0) + (ratio if place in here else ratio.detach())
                    rewards[session] = rows[place]["reward"]
                inside = sum(place in here for place in places)
                if len(members) < 2 or not inside:
                    continue
                ratios = BETA * torch.stack([*members.values()])
                targets = torch.tensor([*rewards.values()], dtype=torch.float64)
                residuals = (ratios - ratios.mean()) - (targets - targets.mean())
                loss = residuals.square().sum() / (2 * (len(members) - 1))
                total, count = total + loss, count + inside / len(places)
                seen.append(float(loss.detach()))
            total = total / count
            if "kl" in case:  # verl's own terms: means over the mini-batch's tokens
                own = [rows[place] for place in sorted(here) if rows[place]["mask"].any()]
                distances = torch.cat([log_ratios(row, "ref") for row in own]).square() / 2
                spreads = [
                    (-logps.exp() * logps).sum(-1)[row["mask"].bool()] for row in own for logps in [logps_of(row)]
                ]
                total = total + case["kl"] * distances.mean() - case["entropy"] * torch.cat(spreads).mean()
            optimizer.zero_grad()
            total.backward()
            gradients.append({name: value.grad.clone() for name, value in model.named_parameters()})
            optimizer.step()
            losses.append(sum(seen) / len(seen))
    return gradients, losses


def main() -> None:
    rows = make_rows()
    mine = len(rows) // ranks
    wanted, losses = ([], []) if case.get("shuffle") else plain_steps(rows, [])
    worker = make_worker()
    batch = as_batch(rows[rank * mine : (rank + 1) * mine])
    scored, found, batches = [], [], []
    worker_module.row_slopes = noted(worker_module.row_slopes, batches)
    worker.engine.infer_batch = counted(worker.engine.infer_batch, scored)
    worker.engine.optimizer_step = recorded(worker.engine, found)
    if case.get("on_policy"):
        worker.infer_batch(tu_copy(batch, compute_loss=False))
        scored.clear()
    if case.get("broken"):
        rows_module.Rows.of_same_groups = lambda rows, here_N: rows.live_N & here_N
    tu.assign_non_tensor(
        batch,
        gvpo_recomputed=bool(case.get("on_policy")),
        global_batch_size=len(rows) // case["mini_batches"],
        mini_batch_size=len(rows) // case["mini_batches"],
        epochs=case["epochs"],
        seed=1,
        dataloader_kwargs={"shuffle": case.get("shuffle", False)},
    )
    metrics = tu.get(worker.train_mini_batch(batch), "metrics")
    if case.get("shuffle"):
        wanted, losses = plain_steps(rows, batches)
    pairs = [(one[name], other[name]) for one, other in zip(wanted, found, strict=True) for name in one]
    result = {
        "error": max(float((one - other).abs().max()) for one, other in pairs),
        "largest": max(float(one.abs().max()) for one, _ in pairs),
        "losses": losses,
        "found_losses": [float(value) for value in metrics["actor/pg_loss"]],
        "split_groups": metrics["gvpo/split_groups"],
        "log_ratio": max(metrics["gvpo/log_ratio/max"]),
        "passes": len(scored),
    }
    if rank == 0:
        print("RESULT " + json.dumps(result, default=str))
    torch.distributed.destroy_process_group()


def noted(function, batches: list):
    """The function of a mini-batch's rows, which notes which they are."""

    def call(rows, here_N, *args):
        batches.append({*here_N.nonzero()[:, 0].tolist()})
        return function(rows, here_N, *args)

    return call


def recorded(engine, gradients: list):
    """The engine's step, which notes the gradients that it is about to take."""
    step = engine.optimizer_step

    def call():
        values = ((name, value.grad) for name, value in engine.module.named_parameters())
        gradients.append(
            {name: getattr(grad, "full_tensor", lambda grad=grad: grad)().clone() for name, grad in values}
        )
        return step()

    return call


def counted(function, calls: list):
    def call(*args, **named):
        calls.append(len(args[0]))
        return function(*args, **named)

    return call


def tu_copy(batch: TensorDict, **flags) -> TensorDict:
    copy = batch.copy()
    tu.assign_non_tensor(copy, **flags)
    return copy


if __name__ == "__main__":
    main()
