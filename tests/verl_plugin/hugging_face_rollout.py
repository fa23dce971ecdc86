"""A rollout engine for verl that draws with `model.forward`, in a Ray actor; registered by importing. For tests."""

from __future__ import annotations

import os

import ray
import torch
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl_on_cpu import ROLLOUT

MOST_TOKENS = int(os.environ.get("TEST_MOST_TOKENS", "6"))


class Server:
    """Draws completions, one token at a time, with the weights it was last sent."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.step = 0

    async def generate(self, request_id, prompt_ids, sampling_params, **named):
        ids, logps = self._draw([*prompt_ids], sampling_params.get("temperature", 1.0))
        extra = {"global_steps": self.step}
        return TokenOutput(token_ids=ids, log_probs=logps, stop_reason="completed", extra_fields=extra)

    @torch.no_grad()
    def _draw(self, prompt: list[int], temperature: float) -> tuple[list[int], list[float]]:
        seen, cache, ids, logps = torch.tensor([prompt]), None, [], []
        while len(ids) < MOST_TOKENS and (not ids or ids[-1] != self.model.config.eos_token_id):
            output = self.model(input_ids=seen, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logps_V = (output.logits[0, -1] / max(temperature, 1e-3)).log_softmax(-1)
            token = int(logps_V.argmax()) if temperature == 0 else int(torch.multinomial(logps_V.exp(), 1))
            ids.append(token)
            logps.append(float(logps_V[token]))
            seen = torch.tensor([[token]])
        return ids, logps

    async def load(self, weights, step):
        self.model.load_state_dict(weights, strict=False)
        self.step = step


async def _nothing(self, *args, **named):
    return None


for name in (
    *("wake_up", "sleep", "clear_kv_cache", "release_kv_cache", "resume_kv_cache"),
    *("resume_generation", "abort_all_requests", "start_profile", "stop_profile"),
):
    setattr(Server, name, _nothing)


class Replica(RolloutReplica):
    async def launch_servers(self):
        options = {"name": f"{ROLLOUT}_{self.replica_rank}", "num_cpus": 0}
        self._server_handle = ray.remote(Server).options(**options).remote(self.model_config.path)
        self.servers, self._server_address = [self._server_handle], f"{ROLLOUT}://{self.replica_rank}"


class Rollout(base.BaseRollout):
    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, wire_format="named_tensors", global_steps=None, **named):
        state = {name: tensor.detach().float().cpu().clone() for name, tensor in weights}
        server = ray.get_actor(f"{ROLLOUT}_{torch.distributed.get_rank()}")
        await server.load.remote(state, global_steps)


RolloutReplicaRegistry.register(ROLLOUT, lambda: Replica)
base._ROLLOUT_REGISTRY[(ROLLOUT, "async")] = "hugging_face_rollout.Rollout"
