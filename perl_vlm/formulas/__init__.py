"""Every equation of perl-vlm as a function of tensors. Nothing here knows a model, a task or a configuration.

Shape letters: B sequences, R response tokens, V vocabulary. Symbols: m mask, l = log pi(a), l0 = log pi_ref(a),
z logits, T temperature, r reward, V value, A advantage, G return, beta KL coefficient, sigma the logistic function,
rho a ratio of probabilities (defined where it is used), c a clip range.

==================== ========================= ================================================= =======================
formula              function                  equation                                          source
==================== ========================= ================================================= =======================
masked sum           ``masked_sum``            sum m x                                           -
masked mean          ``masked_mean``           sum m x / sum m                                   -
masked variance      ``masked_var``            sum m (x - mean)^2 / sum m                        -
whitening            ``masked_whiten``         (x - mean) / sqrt(var + eps) [+ mean]             2403.17031
last real token      ``last_valid``            max {t : m_t}                                     -
reading a position   ``take_at``               x[b, index_b]                                     -
log-probability      ``token_logprobs``        z_a / T - log sum_v exp(z_v / T)                  -
entropy              ``token_entropy``         -sum_v pi(v) log pi(v)                            -
both of one softmax  ``token_logprobs_entropy``  the two above                                   -
sampler agreement    ``logprob_agreement``     mean exp |l_sampler - l_recomputed|               NeMo RL
nucleus              ``top_p_mask``            smallest set of likeliest tokens with sum pi >= p 1904.09751
drawing a token      ``inverse_cdf``           min {v : p_0 + ... + p_v > u sum p}               Devroye 1986
KL, sampled (k1)     ``k1``                    l - l0                                            2309.09055, Schulman
clamped KL           ``clamped_k1``            max(l - l0, 0)                                    2309.09055, AlpacaFarm
squared error (k2)   ``k2``                    (l - l0)^2 / 2                                    2309.09055, Schulman
Bregman (k3)         ``k3``                    rho - 1 - log rho, rho = pi_ref / pi              2309.09055, Schulman
Jensen-Shannon proxy ``js_proxy``              (max(l - log m, 0) + max(l0 - log m, 0)) / 2,     2309.09055
                                               m = (pi + pi_ref) / 2
any of the five      ``sampled_divergence``    k1, clamped_k1, k2, k3, js_proxy by name          2309.09055
KL, exact            ``exact_kl``              sum_v p(v) (log p(v) - log q(v))                  Kullback-Leibler 1951
Jensen-Shannon       ``exact_js``              (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2    Lin 1991
any exact one        ``exact_divergence``      KL(pi || pi_ref), KL(pi_ref || pi), JS by name    -
Bradley-Terry loss   ``bradley_terry``         mean -log sigma(r_c - r_r - margin)               2403.10704, 2307.09288,
                                               + coef mean (r_c + r_r)^2                         2312.09244
label loss           ``label_bce``             -[w p log sigma(r) + (1 - p) log(1 - sigma(r))]   2403.10704, mended
pair accuracy        ``pair_accuracy``         mean [r_c > r_r] + [r_c = r_r] / 2                -
label accuracy       ``label_accuracy``        mean [(r > 0) = (p > 1/2)]                        -
ensemble reward      ``combine_rewards``       mean r_k, min r_k, mean r_k - lambda std r_k      2310.02743, with std
disagreement         ``disagreement``          sqrt(mean_k (r_k - mean)^2)                       -
shaped score         ``shape_scores``          clip(r, -c, c) - e [not ended] - p length         2403.17031
token rewards        ``token_rewards``         -beta d_t + [t = last] s score                    2203.02155, 2403.10704
adaptive beta        ``adaptive_kl_coef``      beta (1 + clip(KL / target - 1, -0.2, 0.2)        1909.08593
                                               n / horizon)
advantages (GAE)     ``gae``                   A_t = delta_t + gamma lambda A_{t+1},             1506.02438
                                               delta_t = r_t + gamma V_{t+1} - V_t
learned baseline     ``baseline_advantages``   A_t = G_t - V_t                                   Williams 1992,
                                                                                                 2403.10704
leave one out        ``rloo_advantages``       A_i = R_i - mean_{j != i} R_j                     Kool 2019, 2402.14740
group-relative       ``grpo_advantages``       A_i = (R_i - mean) / (std + eps)                  2402.03300
for every token      ``over_tokens``           x_{b,t} = m_{b,t} x_b                             -
returns              ``returns_to_go``         G_t = r_t + gamma G_{t+1}                         Williams 1992
explained variance   ``explained_variance``    1 - Var[G - V] / Var[G]                           OpenAI Baselines
policy loss          ``clipped_surrogate``     -mean min(rho A, clip(rho, 1 - c, 1 + c) A),      1707.06347
                                               rho = pi / pi_old
value loss           ``clipped_value_loss``    mean max((V - G)^2, (V_clip - G)^2) / 2,          OpenAI Baselines,
                                               V_clip = clip(V, V_old - c, V_old + c)            2403.17031
==================== ========================= ================================================= =======================

Numbers are arXiv identifiers; each function's docstring gives symbols, shapes, errors and the source in full.
"""

from perl_vlm.formulas.advantages import baseline_advantages, explained_variance, gae, returns_to_go
from perl_vlm.formulas.divergences import (
    clamped_k1,
    exact_divergence,
    exact_js,
    exact_kl,
    js_proxy,
    k1,
    k2,
    k3,
    sampled_divergence,
)
from perl_vlm.formulas.groups import grpo_advantages, over_tokens, rloo_advantages
from perl_vlm.formulas.logprobs import (
    inverse_cdf,
    logprob_agreement,
    token_entropy,
    token_logprobs,
    token_logprobs_entropy,
    top_p_mask,
)
from perl_vlm.formulas.masking import last_valid, masked_mean, masked_sum, masked_var, masked_whiten, take_at
from perl_vlm.formulas.policy_gradient import clipped_surrogate, clipped_value_loss
from perl_vlm.formulas.preference import (
    bradley_terry,
    combine_rewards,
    disagreement,
    label_accuracy,
    label_bce,
    pair_accuracy,
)
from perl_vlm.formulas.rewards import adaptive_kl_coef, shape_scores, token_rewards

__all__ = [
    "adaptive_kl_coef",
    "baseline_advantages",
    "bradley_terry",
    "clamped_k1",
    "clipped_surrogate",
    "clipped_value_loss",
    "combine_rewards",
    "disagreement",
    "exact_divergence",
    "exact_js",
    "exact_kl",
    "explained_variance",
    "gae",
    "grpo_advantages",
    "inverse_cdf",
    "js_proxy",
    "k1",
    "k2",
    "k3",
    "label_accuracy",
    "label_bce",
    "last_valid",
    "logprob_agreement",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "over_tokens",
    "pair_accuracy",
    "returns_to_go",
    "rloo_advantages",
    "sampled_divergence",
    "shape_scores",
    "take_at",
    "token_entropy",
    "token_logprobs",
    "token_logprobs_entropy",
    "token_rewards",
    "top_p_mask",
]
