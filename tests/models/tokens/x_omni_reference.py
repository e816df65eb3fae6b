"""X-Omni's language model written down plainly, one sequence at a time, without cache, padding or a library's layers."""

import torch


class Plain:
    """Weights by their official names, and the settings of ``config.json``."""

    def __init__(self, state, config):
        self.state, self.config = {name: value.double() for name, value in state.items()}, config

    def hidden(self, ids):
        """Final states ``[P, D]`` of a list of ids, after the norm of their kind."""
        config, first = self.config, self.config["vocab_size"]
        tables = self.state["model.lm_embed_tokens.weight"], self.state["model.mm_embed_tokens.weight"]
        states = torch.stack([tables[1][i - first] if i >= first else tables[0][i] for i in ids])
        last = config["num_hidden_layers"] - config["num_mm_head_layers"]
        for number in range(config["num_hidden_layers"]):
            changed = self._layer(number, states)
            for place, i in enumerate(ids):
                if i < first and not config["num_mm_adap_layers"] <= number < last:
                    changed[place] = states[place]
            states = changed
        norms = self.state["model.lm_norm.weight"], self.state["model.mm_norm.weight"]
        return torch.stack([self._norm(state, norms[i >= first]) for state, i in zip(states, ids, strict=True)])

    def text(self, ids):
        """Logits of text tokens ``[P, V]``."""
        return self.hidden(ids) @ self.state["lm_head.weight"].T

    def codes(self, ids):
        """Logits of codes ``[P, V]``; the marks' rows are behind them."""
        return self.hidden(ids) @ self.state["mm_head.weight"][: self.config["image_vocab_size"]].T

    def _norm(self, states, weight):
        return states / (states.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * weight

    def _layer(self, number, states):
        name = f"model.layers.{number}"
        states = states + self._attention(name, self._norm(states, self.state[f"{name}.input_layernorm.weight"]))
        normed = self._norm(states, self.state[f"{name}.post_attention_layernorm.weight"])
        gate, up, down = (self.state[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return states + (torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T

    def _attention(self, name, states):
        length, heads, groups = len(states), self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width = states.shape[1] // heads
        parts = {}
        for part, count in (("q", heads), ("k", groups), ("v", groups)):
            weight, bias = (self.state[f"{name}.self_attn.{part}_proj.{kind}"] for kind in ("weight", "bias"))
            parts[part] = (states @ weight.T + bias).view(length, count, width)
        angle = torch.outer(torch.arange(length).double(), self.config["rope_theta"] ** (-torch.arange(0, width, 2).double() / width))
        turn = torch.complex(angle.cos(), angle.sin())[:, None]
        for part in ("q", "k"):
            pairs = torch.complex(parts[part][..., : width // 2], parts[part][..., width // 2 :]) * turn
            parts[part] = torch.cat([pairs.real, pairs.imag], dim=-1)
        out = torch.zeros(length, heads, width, dtype=torch.float64)
        for head in range(heads):
            group = head * groups // heads
            for place in range(length):
                score = parts["k"][: place + 1, group] @ parts["q"][place, head] / width**0.5
                out[place, head] = score.softmax(0) @ parts["v"][: place + 1, group]
        return out.flatten(1) @ self.state[f"{name}.self_attn.o_proj.weight"].T
