"""Qwen2.5-Math-7B on MATH with LoRA, on one GPU of 80 GB or several: the paper's model where full weights do not fit.

    gvpo prepare --task math --template verl-math --check_against math --drop_overlap --min_share 0.5 --out math.jsonl
    python recipes/math/qwen2.5_math_7b_lora.py                              # one GPU
    torchrun --nproc_per_node 8 recipes/math/qwen2.5_math_7b_lora.py         # eight

All 7.6e9 weights by AdamW in float32 are 122 GB, more than such a GPU has; this library shards none. For all weights on
eight GPUs: recipes/verl/qwen2.5-math-7b-math.sh. Here the weights are frozen (30 GB in float32) and adapters of rank 64
are trained (0.16e9 parameters, 2.6 GB with gradients and moments). Not run yet: no GPU for this long was at hand.

Origin of each value: paper = arXiv 2504.19599; script = the authors' verl script; the adapter and its rate are ours.
"""

from __future__ import annotations

from peft import LoraConfig, get_peft_model

from gvpo import GVPOConfig, GVPOTrainer, load_model

config = GVPOConfig(
    output_dir="runs/qwen2.5-math-7b-lora",
    beta=0.1,  # script; paper: little changes over [0.01, 0.5]
    num_generations=4,  # script (k)
    groups_per_update=256,  # script
    updates_per_rollout=4,  # script
    num_train_epochs=15,  # script
    reference="rollout",  # paper, Algorithm 1; script
    max_completion_length=1024,  # script
    learning_rate=1e-5,  # ours: ten times the script's, as adapters ask for
    lr_scheduler_type="constant",  # script
    weight_decay=0.01,  # script
    max_grad_norm=1.0,  # ours; as in the script it would be 0.25 (docs/verl-migration.md)
    # Ours: where time and memory go
    bf16=True,
    gradient_checkpointing=True,
    token_budget=8192,
    save_steps=28,
    save_total_limit=2,
)

if __name__ == "__main__":
    model, tokenizer = load_model("Qwen/Qwen2.5-Math-7B")  # paper
    adapter = LoraConfig(r=64, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GVPOTrainer(
        get_peft_model(model, adapter), "math.jsonl", "math_accuracy", config=config, tokenizer=tokenizer
    )
    trainer.train()
