"""The miniature with random weights, whole and with one fault each."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import torch

from tests.tiny_random import RandomTiny
from uae.learner import Learner
from uae.miniature import tiny, tiny_janus
from uae.models.captioners.captioner import HFCaptioner
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.tokens.policy import ImageTokenPolicy, TokenSampling
from uae.systems.blueprints import Blueprint
from uae.types import UMM
from uae.weights.placement import Placement


class Guided(RandomTiny):
    """A decoder that draws with guidance."""

    def build(self) -> UMM:
        umm = super().build()
        pipe = umm.renderer.pipe
        return replace(umm, renderer=tiny.assemble_renderer(umm.conditioner, pipe.transformer, pipe.vae, steps=2, guidance=3.0))


class Janus:
    """One network that captions and draws, with guidance."""

    def build(self) -> UMM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tiny_janus.create(width=32, layers=1)
            model.get_input_embeddings().weight.data.normal_(0, 0.1)
            model.model.generation_head.vision_head.weight.data.normal_(0, 0.3)
        return tiny_janus.assemble(model.eval(), tiny_janus.processor(), TokenSampling(3.0))


def faulty(captioner=None, renderer=None, change=None, base=RandomTiny):
    """A system whose captioner or renderer is of another class, or to which something is done after it was built."""

    class Faulty(base):
        def build(self) -> UMM:
            umm = super().build()
            for part, kind in ((umm.captioner, captioner), (umm.renderer, renderer)):
                if kind is not None:
                    part.__class__ = kind
            if change is not None:
                umm = change(umm) or umm
            return umm

    return Faulty


class Shifted(HFCaptioner):
    """Log-probs of sampler and training code, both with one more term."""

    def term(self, rollout):
        raise NotImplementedError

    def sample(self, *args):
        rollout = super().sample(*args)
        return replace(rollout, logp_RS=rollout.logp_RS + self.term(rollout) * rollout.mask_RS)

    def logprobs(self, rollout):
        return super().logprobs(rollout) + self.term(rollout) * rollout.mask_RS


class OtherPolicy(HFCaptioner):
    """The sampler's log-probs are those of another policy."""

    def sample(self, *args):
        rollout = super().sample(*args)
        return replace(rollout, logp_RS=rollout.logp_RS + 0.2 * rollout.mask_RS)


class LooksAhead(Shifted):
    """Every log-prob depends on the last token."""

    def term(self, rollout):
        last_N1 = rollout.mask_RS.sum(1).long()[:, None] - 1
        return 0.01 * rollout.tokens_NT.gather(1, last_N1)


class CountsPadding(Shifted):
    """Every log-prob depends on how much longer the longest caption is."""

    def term(self, rollout):
        return 0.05 * (rollout.mask_RS.shape[1] - rollout.mask_RS.sum(1, keepdim=True))


class CountsRows(Shifted):
    """Every log-prob depends on the place of its row."""

    def term(self, rollout):
        return 0.05 * torch.arange(len(rollout)).flip(0)[:, None] / max(1, len(rollout) - 1)


class Deaf(HFCaptioner):
    """All seeds are one."""

    def sample(self, context, group, sampling, seeds):
        return super().sample(context, group, sampling, [0] * len(seeds))


class Global(HFCaptioner):
    """Draws from the global generator."""

    def sample(self, context, group, sampling, seeds):
        return super().sample(context, group, sampling, torch.randint(2**40, (len(seeds),)).tolist())


class SaysBanned(HFCaptioner):
    """The last token of every caption is a banned one, and log-probs agree."""

    def sample(self, *args):
        rollout = super().sample(*args)
        last_N1 = rollout.mask_RS.sum(1).long()[:, None] - 1
        tokens_NT = rollout.tokens_NT.scatter(1, last_N1, int(self.learner.network.banned_ids[0]))
        return replace(rollout, tokens_NT=tokens_NT, logp_RS=rollout.logp_RS.scatter(1, last_N1, -2.0))

    def logprobs(self, rollout):
        return super().logprobs(rollout).scatter(1, rollout.mask_RS.sum(1).long()[:, None] - 1, -2.0)


class Remembers(HFCaptioner):
    """Captions depend on the number of updates, which no state holds."""

    updates = 0

    def sample(self, context, group, sampling, seeds):
        return super().sample(context, group, sampling, [seed + self.updates for seed in seeds])

    def logprobs(self, rollout):
        self.updates += torch.is_grad_enabled()
        return super().logprobs(rollout)


class Counts(HFCaptioner):
    """An update changes a buffer of the conditioner."""

    def logprobs(self, rollout):
        if torch.is_grad_enabled():
            self.counter += 1
        return super().logprobs(rollout)


def counting(umm):
    umm.captioner.learner.network.model.register_parameter("language_model_unused", torch.nn.Parameter(torch.zeros(2)))
    umm.conditioner.register_buffer("counter", torch.zeros(()))
    umm.captioner.counter = umm.conditioner.counter


class Detaches(torch.nn.Module):
    """A layer that lets no gradient through to its weights."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.func.functional_call(self.layer, {k: p.detach() + 0 * p for k, p in self.layer.named_parameters()}, (x,))


def detached(umm):
    block = umm.captioner.learner.network.model.get_decoder().layers[0]
    block.mlp = Detaches(block.mlp)


def forgotten(umm):
    umm.conditioner.projector.requires_grad_(True)


class Careless(Learner):
    """Does not lead back exactly."""

    @contextmanager
    def reference(self):
        with super().reference():
            yield
        next(p for p in self.network.parameters() if p.requires_grad).data[0, 0] += 1e-6


def careless(umm):
    umm.captioner.learner.__class__ = Careless


class Narrow(DiffusersRenderer):
    """Images lack a column."""

    def render(self, *args, **named):
        return super().render(*args, **named)[..., :-1]


class Bright(DiffusersRenderer):
    """Pixels are not in [0, 1]."""

    def render(self, *args, **named):
        return super().render(*args, **named) * 1.5 + 0.1


class Unmoved(DiffusersRenderer):
    """All seeds are one."""

    def render(self, condition, seeds, *args, **named):
        return super().render(condition, [0] * len(seeds), *args, **named)


class Averages(DiffusersRenderer):
    """An image is mixed with those beside it."""

    def render(self, *args, **named):
        images_NCHW = super().render(*args, **named)
        return 0.7 * images_NCHW + 0.3 * images_NCHW.mean(0)


class GuidesTwice(DiffusersRenderer):
    """Guidance is applied to what is guided already."""

    def _draw(self, *args):
        twice = copy.copy(self)
        twice.rendering = replace(self.rendering, guidance=self.rendering.guidance**2)
        return DiffusersRenderer._draw(twice, *args)


class GuidesTokensTwice(ImageTokenPolicy):
    """The same of image tokens."""

    def twice(self):
        return ImageTokenPolicy(self.learner, replace(self.sampling, guidance=self.sampling.guidance**2), self.rows)

    def sample(self, *args):
        return self.twice().sample(*args)

    def logprobs(self, trajectory):
        return self.twice().logprobs(trajectory)


class RunsTwice(ImageTokenPolicy):
    """A second pass whose result nobody needs, and log-probs of the sampler that are those of another policy."""

    def sample(self, *args):
        taken = super().sample(*args)
        return replace(taken, logp_RS=taken.logp_RS + 1.0)

    def logprobs(self, trajectory):
        super().logprobs(trajectory)
        return super().logprobs(trajectory)


class TokensShifted(ImageTokenPolicy):
    """Log-probs of sampler and training code, both with one more term."""

    def term(self, trajectory):
        raise NotImplementedError

    def sample(self, *args):
        taken = super().sample(*args)
        return replace(taken, logp_RS=taken.logp_RS + self.term(taken))

    def logprobs(self, trajectory):
        return super().logprobs(trajectory) + self.term(trajectory)


class TokensLookAhead(TokensShifted):
    """Every log-prob depends on the last token."""

    def term(self, trajectory):
        return 0.01 * trajectory.actions_RS[:, -1:] * (torch.arange(trajectory.actions_RS.shape[1]) == 0)


class TokensCountRows(TokensShifted):
    """Every log-prob depends on the number of rows."""

    def term(self, trajectory):
        return 0.05 * len(trajectory.actions_RS)


class Planned(RandomTiny):
    """Has a plan of its memory."""

    left_out: tuple[str, ...] = ()

    def blueprint(self) -> Blueprint:
        umm = self.build()
        parts = {
            "conditioner": umm.conditioner, "transformer": umm.renderer.pipe.transformer, "vae": umm.renderer.pipe.vae
        }  # fmt: skip
        exact = Placement("float32")
        frozen = {name: (part.to("meta"), exact) for name, part in parts.items() if name not in self.left_out}
        model = umm.captioner.learner.network.model.to("meta")
        model.tie_weights()  # which the move has untied
        return Blueprint(model, frozen, rendering=umm.renderer.rendering)


class PlannedTooSmall(Planned):
    """The plan lacks the autoencoder."""

    left_out = ("vae",)


class FaultyTiny(faulty(renderer=Bright)):
    """A fault that a configuration can name."""
