"""From what M heads say to one answer and its uncertainty: one op per kind of head.

    EnsembleSummary  logits [M, B, C] -> mean_prob [B, C], predictive_entropy [B],
                     expected_entropy [B], mutual_information [B], variation_ratio [B]
        p_m = softmax(logits_m)                      mean_prob          = mean_m p_m
        predictive_entropy = H(mean_prob)            expected_entropy   = mean_m H(p_m)
        mutual_information = max(0, difference)      variation_ratio    = share of heads whose
                                                                          argmax is not mean_prob's
    SigmoidSummary   logits [M, B, C] -> the same five: C answers that are each right or wrong
        p_m = sigmoid(logits_m)     H(p) = - sum_c p log p + (1 - p) log(1 - p)
        variation_ratio = share of (head, answer) whose p > 0.5 is not that of mean_prob
    GaussianSummary  params [M, B, 2D] = (mean, log variance) -> mean, aleatoric_variance,
                     epistemic_variance, each [B, D]
        law of total variance: aleatoric = mean_m exp(log variance_m), epistemic = var_m mean_m

Entropies in nats. Mutual information is a small difference of large terms, so everything here is
computed in fp32 whatever the heads are stored in, and 0·log 0 counts as 0.
Sources: Depeweg et al. 2018 (arXiv 1710.07283) eq. 5; Lakshminarayanan et al. 2017 §2.4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

CLASSIFICATION_OUTPUTS = (
    "mean_prob",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "variation_ratio",
)
ENTROPIES = ("predictive_entropy", "expected_entropy", "mutual_information")  # in nats
GAUSSIAN_OUTPUTS = ("mean", "aleatoric_variance", "epistemic_variance")

# 1.2e-38 is the smallest normal fp32: it keeps log finite and multiplies a probability of 0 anyway.
FUNCTIONS = {
    "EnsembleSummary": """
EnsembleSummary (logits) =>
    (mean_prob, predictive_entropy, expected_entropy, mutual_information, variation_ratio)
{
    heads = Constant <value_ints: ints = [0]> ()
    classes = Constant <value_ints: ints = [-1]> ()
    zero = Constant <value: tensor = float {0.0}> ()
    one = Constant <value: tensor = float {1.0}> ()
    tiny = Constant <value: tensor = float {1.2e-38}> ()
    logits32 = Cast <to: int = 1> (logits)
    p = Softmax <axis: int = -1> (logits32)
    mean_prob = ReduceMean <keepdims: int = 0> (p, heads)

    p_safe = Max (p, tiny)
    p_log = Log (p_safe)
    p_weighted = Mul (p, p_log)
    p_negentropy = ReduceSum <keepdims: int = 0> (p_weighted, classes)
    mean_negentropy = ReduceMean <keepdims: int = 0> (p_negentropy, heads)
    expected_entropy = Neg (mean_negentropy)

    mean_safe = Max (mean_prob, tiny)
    mean_log = Log (mean_safe)
    mean_weighted = Mul (mean_prob, mean_log)
    total_negentropy = ReduceSum <keepdims: int = 0> (mean_weighted, classes)
    predictive_entropy = Neg (total_negentropy)
    difference = Sub (predictive_entropy, expected_entropy)
    mutual_information = Max (difference, zero)

    votes = ArgMax <axis: int = -1, keepdims: int = 0> (p)
    winner = ArgMax <axis: int = -1, keepdims: int = 0> (mean_prob)
    agrees = Equal (votes, winner)
    agrees32 = Cast <to: int = 1> (agrees)
    agreement = ReduceMean <keepdims: int = 0> (agrees32, heads)
    variation_ratio = Sub (one, agreement)
}
""",
    # The entropy of a coin with the log odds l is log(1 + e^-|l|) + |l| e^-|l| / (1 + e^-|l|): it
    # keeps what 1 - p loses where p is small, as it is for most answers. From |l| = 100 it is 0.
    # ONNX Runtime's Sigmoid is 0 from l = -18 on, so p is written out; and mutual information is
    # summed answer by answer, because both entropies are sums of thousands of terms.
    "SigmoidSummary": """
SigmoidSummary (logits) =>
    (mean_prob, predictive_entropy, expected_entropy, mutual_information, variation_ratio)
{
    heads = Constant <value_ints: ints = [0]> ()
    classes = Constant <value_ints: ints = [-1]> ()
    votes = Constant <value_ints: ints = [0, -1]> ()
    zero = Constant <value: tensor = float {0.0}> ()
    one = Constant <value: tensor = float {1.0}> ()
    half = Constant <value: tensor = float {0.5}> ()
    tiny = Constant <value: tensor = float {1.2e-38}> ()
    most = Constant <value: tensor = float {100.0}> ()
    logits32 = Cast <to: int = 1> (logits)
    opposite = Neg (logits32)
    p_odds = Exp (opposite)
    p_total = Add (one, p_odds)
    p = Reciprocal (p_total)
    mean_prob = ReduceMean <keepdims: int = 0> (p, heads)

    size = Abs (logits32)
    a = Min (size, most)
    a_negative = Neg (a)
    a_log = Softplus (a_negative)
    a_odds = Exp (a_negative)
    a_total = Add (one, a_odds)
    a_small = Div (a_odds, a_total)
    a_rest = Mul (a, a_small)
    coins = Add (a_log, a_rest)
    coins_mean = ReduceMean <keepdims: int = 0> (coins, heads)
    expected_entropy = ReduceSum <keepdims: int = 0> (coins_mean, classes)

    q_odds = Exp (logits32)
    q_total = Add (one, q_odds)
    q = Reciprocal (q_total)
    mean_rest = ReduceMean <keepdims: int = 0> (q, heads)
    mean_safe = Max (mean_prob, tiny)
    rest_safe = Max (mean_rest, tiny)
    mean_log = Log (mean_safe)
    rest_log = Log (rest_safe)
    mean_odds = Sub (mean_log, rest_log)
    b = Abs (mean_odds)
    b_negative = Neg (b)
    b_log = Softplus (b_negative)
    b_odds = Exp (b_negative)
    b_total = Add (one, b_odds)
    b_small = Div (b_odds, b_total)
    b_rest = Mul (b, b_small)
    mean_coins = Add (b_log, b_rest)
    predictive_entropy = ReduceSum <keepdims: int = 0> (mean_coins, classes)
    differences = Sub (mean_coins, coins_mean)
    difference = ReduceSum <keepdims: int = 0> (differences, classes)
    mutual_information = Max (difference, zero)

    yes = Greater (logits32, zero)
    mean_yes = Greater (mean_prob, half)
    differs = Xor (yes, mean_yes)
    differs32 = Cast <to: int = 1> (differs)
    variation_ratio = ReduceMean <keepdims: int = 0> (differs32, votes)
}
""",
    "GaussianSummary": """
GaussianSummary (params) => (mean, aleatoric_variance, epistemic_variance)
{
    heads = Constant <value_ints: ints = [0]> ()
    params32 = Cast <to: int = 1> (params)
    means, log_variances = Split <axis: int = -1, num_outputs: int = 2> (params32)
    mean = ReduceMean <keepdims: int = 0> (means, heads)
    variances = Exp (log_variances)
    aleatoric_variance = ReduceMean <keepdims: int = 0> (variances, heads)
    offsets = Sub (means, mean)
    squares = Mul (offsets, offsets)
    epistemic_variance = ReduceMean <keepdims: int = 0> (squares, heads)
}
""",
}


def softmax(logits: npt.ArrayLike) -> Float:
    """Softmax over the last axis, in float64."""
    values = np.asarray(logits, np.float64)
    exp = np.exp(values - values.max(-1, keepdims=True))
    return np.asarray(exp / exp.sum(-1, keepdims=True))


def entropy(prob: npt.ArrayLike) -> Float:
    """Shannon entropy over the last axis, in nats; 0·log 0 counts as 0."""
    p = np.asarray(prob, np.float64)
    return np.asarray(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), -1))


def reference_classification(logits: npt.ArrayLike) -> dict[str, Float]:
    """`EnsembleSummary` in numpy float64.

    Args:
        logits: ``[M, B, C]``.

    Returns:
        The five outputs by name.
    """
    p = softmax(logits)
    mean_prob = p.mean(0)
    predictive, expected = entropy(mean_prob), entropy(p).mean(0)
    agreement = (p.argmax(-1) == mean_prob.argmax(-1)).mean(0)
    return {
        "mean_prob": mean_prob,
        "predictive_entropy": predictive,
        "expected_entropy": expected,
        "mutual_information": np.maximum(predictive - expected, 0.0),
        "variation_ratio": 1.0 - agreement,
    }


def sigmoid(logits: npt.ArrayLike) -> Float:
    """Logistic function, in float64; no logit overflows."""
    values = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(values))
    return np.asarray(np.where(values > 0, 1.0, small) / (1 + small))


def coin_entropy(logits: npt.ArrayLike) -> Float:
    """Entropy in nats of a coin with these log odds, element by element."""
    size = np.minimum(np.abs(np.asarray(logits, np.float64)), 700.0)  # where e^-size is 1e-304
    small = np.exp(-size)
    return np.asarray(np.log1p(small) + size * small / (1 + small))


def reference_sigmoid(logits: npt.ArrayLike) -> dict[str, Float]:
    """`SigmoidSummary` in numpy float64.

    Args:
        logits: ``[M, B, C]``.

    Returns:
        The five outputs by name; entropies are sums over the C answers.
    """
    values = np.asarray(logits, np.float64)
    mean_prob = sigmoid(values).mean(0)
    with np.errstate(divide="ignore"):
        odds = np.log(mean_prob) - np.log(sigmoid(-values).mean(0))
    predictive, expected = coin_entropy(odds).sum(-1), coin_entropy(values).sum(-1).mean(0)
    return {
        "mean_prob": mean_prob,
        "predictive_entropy": predictive,
        "expected_entropy": expected,
        "mutual_information": np.maximum(predictive - expected, 0.0),
        "variation_ratio": ((values > 0) != (mean_prob > 0.5)).mean((0, 2)),
    }


def reference_gaussian(params: npt.ArrayLike) -> dict[str, Float]:
    """`GaussianSummary` in numpy float64.

    Args:
        params: ``[M, B, 2D]``, means first, then log variances.

    Returns:
        The three outputs by name, each ``[B, D]``.
    """
    mean, log_variance = np.split(np.asarray(params, np.float64), 2, axis=-1)
    return {
        "mean": mean.mean(0),
        "aleatoric_variance": np.exp(log_variance).mean(0),
        "epistemic_variance": mean.var(0),
    }
