"""A module with the parts of vLLM's API that are used, and weights of its own: what was not sent, it does not have.

It knows captioners of Qwen2.5-VL. It draws one caption at a time, without a cache of keys and values, and keeps the logits
behind a prompt until both of its caches are reset, as vLLM keeps prompts and image features.
"""

import copy
import sys
from types import ModuleType, SimpleNamespace

import torch


class SamplingParams:
    """As vLLM's: what is not given does nothing."""

    def __init__(self, *, temperature, max_tokens, seed, logprobs, logit_bias, stop_token_ids, ignore_eos, detokenize):
        assert logprobs == 0
        assert ignore_eos  # else the checkpoint's own end would count, too
        assert not detokenize
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self.bias, self.ends = logit_bias, stop_token_ids


class LLM:
    """The settings are kept in ``settings``, the names of all weights that were sent in ``sent``, push by push."""

    started = []  # all engines

    def __init__(self, model, load_format, dtype, logprobs_mode, **settings):
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        assert load_format == "dummy"
        config, self.settings = AutoConfig.from_pretrained(model), settings
        torch.manual_seed(1234)  # as vLLM does, which changes the generator of the process
        self.model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype)).eval()
        assert [type(self.model).__name__] == config.architectures
        self.processor = AutoProcessor.from_pretrained(model)
        self.model.load_weights = self._load_weights
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(logprobs_mode=logprobs_mode), reset_encoder_cache=lambda: self.encoder.clear()
        )
        self.prefix, self.encoder, self.asleep, self.sent, self.drawn = {}, {}, False, [], 0
        LLM.started.append(self)

    def _load_weights(self, weights):
        own = dict(self.model.named_parameters())
        self.sent.append([])
        for name, weight in weights:
            assert weight.dtype == own[name].dtype
            self.sent[-1].append(name)
            with torch.no_grad():
                own[name].copy_(weight)

    def apply_model(self, function):
        assert not self.asleep
        return [function(self.model)]

    def reset_prefix_cache(self):
        self.prefix.clear()
        return True

    def sleep(self, level):
        assert self.settings["enable_sleep_mode"]
        assert level == 1  # of level 2 no weights would come back
        assert not self.asleep
        self.asleep = True
        self.prefix.clear()

    def wake_up(self):
        assert self.asleep
        self.asleep = False

    @torch.no_grad()
    def generate(self, prompts, parameters, use_tqdm):
        assert not self.asleep
        assert not torch.is_autocast_enabled("cpu")
        self.drawn += len(prompts)
        return [self._answer(one, how) for one, how in zip(prompts, parameters, strict=True)]

    def _answer(self, prompt, how):
        image = prompt["multi_modal_data"]["image"]
        seen = self.processor.image_processor(images=[image], return_tensors="pt")
        pieces = int(seen["image_grid_thw"].prod()) // self.processor.image_processor.merge_size**2
        mark = self.model.config.image_token_id
        assert prompt["prompt_token_ids"].count(mark) == 1
        ids = [token for one in prompt["prompt_token_ids"] for token in [one] * (pieces if one == mark else 1)]
        key, tokens, logprobs = (tuple(ids), image.tobytes()), [], []
        room = (self.settings.get("max_model_len") or 10**6) - len(ids)
        noise = torch.Generator().manual_seed(how.seed)
        while len(tokens) < min(how.max_tokens, room) and not (tokens and tokens[-1] in how.ends):
            logits_V = self.prefix.get(key, self.encoder.get(key)) if not tokens else None
            if logits_V is None:
                logits_V = self._logits(ids + tokens, seen)
                if not tokens:
                    self.prefix[key] = self.encoder[key] = logits_V
            logp_V = self._logprobs(logits_V, how)
            token = int(logp_V.argmax() if how.temperature == 0 else torch.multinomial(logp_V.exp(), 1, generator=noise))
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(self._reported(logp_V, logits_V)[token]))})
        output = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=ids, outputs=[output])

    def _logits(self, ids, seen):
        ids_1T = torch.tensor([ids])
        kinds_1T = (ids_1T == self.model.config.image_token_id).long()
        mask_1T = torch.ones_like(ids_1T)
        out = self.model(input_ids=ids_1T, attention_mask=mask_1T, mm_token_type_ids=kinds_1T, use_cache=False, **seen)
        return out.logits[0, -1].float()

    def _logprobs(self, logits_V, how):
        allowed_V = logits_V.clone()
        for token, bias in how.bias.items():
            allowed_V[token] += bias
        return (allowed_V / (how.temperature or 1.0)).log_softmax(-1)

    def _reported(self, logp_V, logits_V):
        return logp_V


class RawLLM(LLM):
    """Reports log-probs of the model's distribution, before temperature and bans, as vLLM does by default."""

    def _reported(self, logp_V, logits_V):
        return logits_V.log_softmax(-1)


class OtherModeLLM(LLM):
    """Does not take the setting."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.llm_engine.model_config.logprobs_mode = "raw_logprobs"


def install(monkeypatch, llm=LLM, version="0.33.0", gpu=True):
    """Let ``import vllm`` find this module until the test ends. Returns the list of engines that are started."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = llm, SamplingParams, version
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("uae.models.captioners.vllm_engine._has_gpu", lambda: gpu)
    monkeypatch.setattr(LLM, "started", [])
    return LLM.started


def same_weights(engine, policy):
    """Whether an engine has the weights of a policy, whose adapter PEFT itself merges."""
    model = copy.deepcopy(policy.model)
    model = model.merge_and_unload() if policy.adapted else model
    mine, theirs = dict(model.named_parameters()), dict(engine.model.named_parameters())
    assert mine.keys() == theirs.keys()
    return all(torch.allclose(mine[name], theirs[name], atol=1e-6, rtol=0) for name in mine)
