"""The loss terms: pure functions of tensors. Each says its formula, its reduction and its source.

A KD loss takes ``student``, ``teacher`` and ``valid`` by keyword and returns a scalar. ``valid`` marks the positions to
compare: where the Teacher saw another view, the Student's frame is not covered everywhere (see ``distillation.warp``).
Gradients flow into ``student`` alone: the Teacher's maps come without a graph.

Logits of one channel are those of the lesion against the background (Bernoulli). Of K classes there are K + 1 channels,
background first (softmax), and a mask holds the index of each pixel's class, 0 for background.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import BINARY_MODE, DiceLoss
from torch import Tensor

DICE = DiceLoss(BINARY_MODE, from_logits=True)


def one_hot(mask: Tensor, *, channels: int) -> Tensor:
    """Return for each class where it is: (N, channels, H, W) float in {0, 1}.

    Args:
        mask: (N, 1, H, W), class indices below ``channels``.
        channels: classes and background.

    Example:
        >>> one_hot(torch.tensor([[[[0, 2]]]]), channels=3)[0, :, 0]
        tensor([[1., 0.],
                [0., 0.],
                [0., 1.]])
    """
    return (mask == torch.arange(channels, device=mask.device)[:, None, None]).float()


def cross_entropy(*, logits: Tensor, mask: Tensor) -> Tensor:
    """Pixel-wise cross-entropy, mean over all pixels: the supervised term (PAPER, Eq. I, L_sup).

    One channel: -[y log s(z) + (1 - y) log(1 - s(z))] with s the logistic function; several: -log softmax(z)_y.

    Args:
        logits: (N, 1, H, W) or, of K classes, (N, K + 1, H, W), before activation.
        mask: (N, 1, H, W), ground truth in {0, 1} or {0, ..., K}.

    Example:
        >>> mask = torch.ones(1, 1, 2, 2)
        >>> cross_entropy(logits=torch.zeros(1, 1, 2, 2), mask=mask)  # -log(1/2)
        tensor(0.6931)
        >>> cross_entropy(logits=torch.zeros(1, 3, 2, 2), mask=mask)  # -log(1/3)
        tensor(1.0986)
    """
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits.float(), mask.float())
    # Of probabilities: PyTorch's cross-entropy of class indices in images has no deterministic kernel on CUDA.
    return F.cross_entropy(logits.float(), one_hot(mask, channels=logits.shape[1]))


def cross_entropy_and_dice(*, logits: Tensor, mask: Tensor) -> Tensor:
    """Pixel-wise cross-entropy plus 1 - the soft Dice of the batch's pixels together.

    2 sum(p y) / (sum(p) + sum(y)) with p the probability of the lesion (s(z), the logistic function) and y the mask.
    Of several classes the mean of that over those lesion classes that the batch has, p their softmax and y where they
    are; the background has no Dice, and a batch without lesion adds 0 either way. Source of the sum and of the
    background's absence: Isensee et al., nnU-Net, Nature Methods 18, 2021. The Dice of one class is
    segmentation-models-pytorch's; its mean over several is over absent ones too.

    Args:
        logits: (N, 1, H, W) or, of K classes, (N, K + 1, H, W), before activation.
        mask: (N, 1, H, W), ground truth in {0, 1} or {0, ..., K}.

    Example:
        >>> mask = torch.ones(1, 1, 2, 2)
        >>> cross_entropy_and_dice(logits=torch.zeros(1, 1, 2, 2), mask=mask)  # log 2 + 1 - 2 * 2 / (2 + 4)
        tensor(1.0265)
        >>> cross_entropy_and_dice(logits=torch.zeros(1, 3, 2, 2), mask=mask)  # log 3 + 1 - 2 * 4/3 / (4/3 + 4)
        tensor(1.5986)
    """
    cross = cross_entropy(logits=logits, mask=mask)
    if logits.shape[1] == 1:
        dice: Tensor = DICE(logits.float(), mask.float())
        return cross + dice
    shares, truth = logits.float().softmax(dim=1)[:, 1:], one_hot(mask, channels=logits.shape[1])[:, 1:]
    both, size, pixels = (maps.sum(dim=(0, 2, 3)) for maps in (shares * truth, shares, truth))
    is_present = (pixels > 0).float()
    dices = 2 * both / (size + pixels).clamp_min(1e-7)
    return cross + ((1 - dices) * is_present).sum() / is_present.sum().clamp(min=1)


def mse(*, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean squared difference over channels and valid positions (PAPER, Eq. II).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        valid: (N, 1, H, W) bool.

    Example:
        >>> ones = torch.ones(1, 1, 1, 2)
        >>> mse(student=3 * ones, teacher=ones, valid=ones > 0)  # (3 - 1)^2
        tensor(4.)
    """
    squared = (student.float() - teacher.float()).square()
    return torch.where(valid, squared, 0.0).sum() / (valid.sum() * student.shape[1]).clamp(min=1)


def kld_pixels(*, student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each pixel's distribution over classes, mean over valid pixels (PAPER, Eq. III).

    With one logit z per pixel the distribution is Bernoulli, P(lesion) = s(z / T):
    P log(P / Q) + (1 - P) log((1 - P) / (1 - Q)). A softmax over the single channel would be constantly 1. With several
    channels it is their softmax: sum_c P_c log(P_c / Q_c), P = softmax(z / T).
    T^2 keeps the gradient's size when T changes (Hinton et al. 2015, section 2).

    Args:
        student: (N, C, H, W) logits, Q.
        teacher: (N, C, H, W) logits, P.
        valid: (N, 1, H, W) bool.
        temperature: T > 0.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0).log()
        >>> kld_pixels(student=student, teacher=teacher, valid=student == 0)  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor(0.1308)
        >>> student, teacher = torch.zeros(1, 3, 1, 1), torch.tensor([2.0, 1.0, 1.0]).log()[None, :, None, None]
        >>> kld_pixels(student=student, teacher=teacher, valid=student[:, :1] == 0)  # 1/2 log(3/2) + 2 * 1/4 log(3/4)
        tensor(0.0589)
    """
    z_student, z_teacher = student.float() / temperature, teacher.float() / temperature
    if student.shape[1] == 1:
        p = torch.sigmoid(z_teacher)
        lesion = p * (F.logsigmoid(z_teacher) - F.logsigmoid(z_student))
        background = (1 - p) * (F.logsigmoid(-z_teacher) - F.logsigmoid(-z_student))
        divergence = lesion + background
    else:
        log_q, log_p = z_student.log_softmax(dim=1), z_teacher.log_softmax(dim=1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1, keepdim=True)
    divergence = torch.where(valid, divergence, 0.0)
    return temperature**2 * divergence.sum() / valid.sum().clamp(min=1)


def kld_positions(*, student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each channel's softmax over positions, mean over channels and images.

    Channel-wise distillation (Shu et al., ICCV 2021; PAPER, Eq. III): P_i = exp(t_i / T) / sum_j exp(t_j / T)
    over the valid positions i of one channel, the divergence summed over positions.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        valid: (N, 1, H, W) bool; other positions have probability 0 in both distributions.
        temperature: T > 0.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, 1.0]]]]).log()
        >>> kld_positions(student=student, teacher=teacher, valid=student == 0)  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor(0.1308)
    """
    inside = valid.flatten(2)
    lowest = torch.finfo(torch.float32).min  # finite: an image without any valid position contributes 0, not NaN
    log_q = F.log_softmax((student.float().flatten(2) / temperature).masked_fill(~inside, lowest), dim=2)
    log_p = F.log_softmax((teacher.float().flatten(2) / temperature).masked_fill(~inside, lowest), dim=2)
    divergence = torch.where(inside, log_p.exp() * (log_p - log_q), 0.0)
    return temperature**2 * divergence.sum(dim=2).mean()
