"""KL divergences between the predictions of the unedited and of an edited model."""

import torch
from jaxtyping import Float
from torch import Tensor


def divergences(
    base: Float[Tensor, "token vocabulary"],
    normaliser: Float[Tensor, " token"],
    other: Float[Tensor, "token vocabulary"],
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """KL(base || other) of each token's prediction, in nats, and the log-normaliser of `other`.

    `normaliser` is the log-normaliser of `base`. With c = other - base and d = c - E_p c, where p are the
    base's probabilities, KL = log E_p exp(d) = log(1 + E_p expm1(d)). The part that two nearly equal
    predictions share cancels before it is summed, so fp32 suffices where -Σ p log(q/p) needs fp64. The
    rounding residue of E_p d is subtracted. Source: ours.
    """
    kls, normalisers = [], []
    for z, log_sum, others in zip(base.split(256), normaliser.split(256), other.split(256), strict=True):
        p = (z - log_sum[:, None]).exp_()
        c = others - z
        mean = torch.linalg.vecdot(p, c)
        d = c.sub_(mean[:, None])
        residue = torch.linalg.vecdot(p, d)
        growth = torch.linalg.vecdot(p, d.expm1_()).log1p()
        kl, log_sums = (growth - residue).clamp(min=0), log_sum + mean + growth
        far = ~(kl < 1)  # expm1 may overflow here, and the direct formula loses no digits
        if bool(far.any()):
            log_sums[far] = others[far].logsumexp(-1)
            kl[far] = log_sums[far] - log_sum[far] - mean[far]
        kls.append(kl)
        normalisers.append(log_sums)
    return torch.cat(kls), torch.cat(normalisers)
