"""How far the predictions of an edited model are from those of the unedited one."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def divergences(
    base: Float[Tensor, "token vocabulary"],
    normaliser: Float[Tensor, " token"],
    other: Float[Tensor, "token vocabulary"],
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """KL(base || other) of each token's prediction, in nats, and the log of the other's normaliser.

    `normaliser` is that of the base. With c = other - base and d = c - E_p c, p being the base's
    probabilities, KL = log E_p exp(d) = log(1 + E_p expm1(d)): what two nearly equal predictions have in
    common is never added up, so that fp32 does where -Σ p log(q/p) needs fp64. What rounding leaves of
    E_p d is taken off. Source: ours.
    """
    found, normalisers = [], []
    for z, log_sum, others in zip(base.split(256), normaliser.split(256), other.split(256), strict=True):
        p = (z - log_sum[:, None]).exp_()
        c = others - z
        mean = torch.linalg.vecdot(p, c)
        d = c.sub_(mean[:, None])
        left = torch.linalg.vecdot(p, d)
        growth = torch.linalg.vecdot(p, d.expm1_()).log1p()
        divergence, log_sums = (growth - left).clamp(min=0), log_sum + mean + growth
        far = ~(divergence < 1)  # there expm1 may overflow, and the plain formula has all its digits
        if bool(far.any()):
            log_sums[far] = others[far].logsumexp(-1)
            divergence[far] = log_sums[far] - log_sum[far] - mean[far]
        found.append(divergence)
        normalisers.append(log_sums)
    return torch.cat(found), torch.cat(normalisers)


def kl_divergence(
    base: Float[Tensor, "sequence position vocabulary"],
    other: Float[Tensor, "sequence position vocabulary"],
    where: Bool[Tensor, "sequence position"],
) -> Float[Tensor, " token"]:
    """KL(base || other) of the predictions of two sets of logits, at the marked positions, in nats.

    In fp64, as the rounding of fp32 exceeds the KL of a small update and may be negative; in slices of
    the positions, so that no fp64 copy of all logits is held.
    """
    divergences = []
    for some, others in zip(base[where].split(256), other[where].split(256), strict=True):
        p, q = some.double().log_softmax(-1), others.double().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(divergences)
