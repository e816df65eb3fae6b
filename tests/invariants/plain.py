"""A training step without any of the project's machinery: one row at a time, one token at a time."""

import copy
import math

import torch


def logprobs(captioner, images, tokens, lengths, group, temperature):
    """Log-probs of every caption, by the library's own forward on prompt and caption in one piece."""
    model = captioner.learner.network.base
    rows = []
    for n, length in enumerate(lengths):
        context = captioner.prepare(images[n // group][None])
        inputs = context.inputs()
        caption = tokens[n, :length][None]
        prompt = inputs["input_ids"].shape[1]
        for key, fill in (("input_ids", caption), ("attention_mask", torch.ones_like(caption))):
            inputs[key] = torch.cat([inputs[key], fill], dim=1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(caption)], dim=1)
        logits = model(**inputs, use_cache=False).logits[0, prompt - 1 : -1].double() / temperature
        logits[:, captioner.learner.network.banned_ids] = -math.inf
        rows.append(torch.stack([logits[t].log_softmax(0)[caption[0, t]] for t in range(length)]))
    return rows


def loss(rows, old_rows, reference_rows, rewards, beta, epsilon):
    """GRPO with the group's std, clipping and k3, aggregated by row."""
    total, clipped, count = 0.0, 0, 0
    group = len(rewards[0])
    for n, row in enumerate(rows):
        mine = rewards[n // group]
        mean = sum(mine) / group
        std = math.sqrt(sum((r - mean) ** 2 for r in mine) / (group - 1))
        advantage = (mine[n % group] - mean) / (std + 1e-4)
        row_total = 0.0
        for t in range(len(row)):
            ratio = torch.exp(row[t] - old_rows[n][t].detach())
            bounded = min(max(ratio.item(), 1 - epsilon), 1 + epsilon)
            if ratio.item() * advantage <= bounded * advantage:
                policy = -ratio * advantage
            else:
                policy, clipped = torch.tensor(-bounded * advantage), clipped + 1
            d = reference_rows[n][t].detach() - row[t]
            row_total = row_total + policy + beta * (torch.exp(d) - d - 1)
            count += 1
        total = total + row_total / len(row)
    return total / len(rows), clipped / count


def train(captioner, trainable, experience, images, steps, rate, beta, epsilon):
    """``steps`` updates by plain gradient descent on one rollout. Returns losses, clip fractions and the policy."""
    start, captioner = copy.deepcopy(captioner), copy.deepcopy(captioner)
    rollout = experience.rollout
    lengths = rollout.mask_RS.sum(1).int().tolist()
    arguments = (images, rollout.tokens_NT, lengths, rollout.group, rollout.temperature)
    with torch.no_grad():
        reference_rows = logprobs(start, *arguments)
    old_rows, losses, fractions = reference_rows, [], []
    for _ in range(steps):
        rows = logprobs(captioner, *arguments)
        value, fraction = loss(rows, old_rows, reference_rows, experience.rewards.reward_BG.tolist(), beta, epsilon)
        parameters = [p for name, p in captioner.learner.network.named_parameters() if name in trainable]
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.data -= rate * gradient
        losses.append(value.item())
        fractions.append(fraction)
    return losses, fractions, captioner.learner.network
