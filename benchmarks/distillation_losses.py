"""Forward and backward of each distillation loss against its formula written down as public code does.

`python benchmarks/distillation_losses.py --out FILE.json [--only NAME ...]`. Both forms run in turn, on one thread and
the same tensors. Times are CPU seconds of the process, which a busy machine lengthens less than seconds by the clock;
figures are medians, the speed-up is the median of the ratios of neighbouring runs, beside its quartiles. Peak memory is
that of a fresh process for each form, beyond what the tensors take. How exact both forms are is measured against the
public form in float64: relative to the largest value, and to the largest entry of the gradient.

An entry of `CASES` is a pair of functions under a name: one makes the tensors (teacher, student), the other returns
ours and the naive form, which both take these tensors and return a scalar.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.functional import attention, contrast, distributions, map_statistics, ranking, relations
from hubtransfer.functional.boundaries import boundary_distance
from hubtransfer.functional.factors import factor_distance
from hubtransfer.functional.likelihood import surprise
from hubtransfer.training.record import versions

ROUNDS, SECONDS = 400, 6.0
ASKED = {"nst": 30, "fsp": 50, "rkd angle 256": 12, "crd": 10}
"""Speed-ups that were asked for; the others shall be no slower."""
Loss = Callable[[Tensor, Tensor], Tensor]


def embeddings(batch: int = 64, width: int = 512) -> tuple[Tensor, Tensor]:
    """Returns features of teacher and student."""
    return torch.randn(batch, width), torch.randn(batch, width, requires_grad=True)


def maps(batch: int = 64, channels: int = 64, side: int = 32) -> tuple[Tensor, Tensor]:
    """Returns feature maps of teacher and student."""
    shape = (batch, channels, side, side)
    return torch.randn(shape), torch.randn(shape, requires_grad=True)


def logits() -> tuple[Tensor, Tensor]:
    """Returns logits of teacher and student."""
    return embeddings(64, 100)


def kd(teacher: Tensor, student: Tensor) -> Tensor:
    """Softened divergence, T = 4."""
    return 16 * F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")


def sp(teacher: Tensor, student: Tensor) -> Tensor:
    """Distance of row-normalised Gram matrices."""
    grams = []
    for x in (student, teacher):
        flat = x.view(len(x), -1)
        grams.append(F.normalize(flat @ flat.t(), dim=1))
    return (grams[0] - grams[1]).pow(2).sum() / len(student) ** 2


def pkt(teacher: Tensor, student: Tensor) -> Tensor:
    """Divergence of neighbourhoods."""
    probabilities = []
    for x in (student, teacher):
        unit = F.normalize(x, dim=1)  # public code adds 1e-7 to the length, which moves the result by 2e-8
        kernel = (unit @ unit.t() + 1) / 2
        probabilities.append(kernel / kernel.sum(1, keepdim=True))
    q, p = probabilities
    return (p * torch.log((p + 1e-7) / (q + 1e-7))).mean()


def cc(teacher: Tensor, student: Tensor) -> Tensor:
    """Distance of Gaussian kernels, Taylor series of order 2."""
    kernels = []
    for x in (student, teacher):
        unit = F.normalize(x, dim=1)
        product = unit @ unit.t()
        kernel = torch.zeros_like(product)
        for p in range(3):
            kernel = kernel + math.exp(-0.8) * 0.8**p / math.factorial(p) * product.pow(p)
        kernels.append(kernel)
    return F.mse_loss(kernels[0], kernels[1])


def _distances(x: Tensor) -> Tensor:
    squares = x.pow(2).sum(1)
    distances = (squares[:, None] + squares[None] - 2 * x @ x.t()).clamp(min=1e-12).sqrt()
    return distances * (1 - torch.eye(len(x)))


def rkd_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Smooth L1 of distances over their mean."""
    with torch.no_grad():
        theirs = _distances(teacher)
        theirs = theirs / theirs[theirs > 0].mean()
    own = _distances(student)
    return F.smooth_l1_loss(own / own[own > 0].mean(), theirs)


def rkd_angle(teacher: Tensor, student: Tensor) -> Tensor:
    """Smooth L1 of the cosines of all triplets, held at once."""

    def cosines(x: Tensor) -> Tensor:
        arms = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
        return torch.bmm(arms, arms.transpose(1, 2)).view(-1)

    with torch.no_grad():
        theirs = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), theirs)


def dark_rank(teacher: Tensor, student: Tensor) -> Tensor:
    """Plackett-Luce of the four nearest, one logsumexp a place."""
    theirs, own = (-3 * _distances(F.normalize(x, dim=1)).pow(3) for x in (teacher, student))
    nearest = theirs.sort(dim=1, descending=True)[1][:, 1:5]
    scores = own.gather(1, nearest)
    sums = torch.stack([torch.logsumexp(scores[:, k:], 1) for k in range(nearest.shape[1])], 1)
    return -(scores - sums).sum(1).mean()


def crd(examples: int = 50_000, negatives: int = 16_384, width: int = 128) -> tuple[Loss, Loss]:
    """Returns ours and the naive form on one bank and one draw: rows gathered, (batch, negatives, width)."""
    bank = F.normalize(torch.randn(examples, width), dim=1)
    index, others = torch.arange(64), torch.randint(examples, (64, negatives))
    odds = float(negatives)

    def ours(_: Tensor, student: Tensor) -> Tensor:
        return contrast.bank_contrast(student, bank.to(student), index, others, 0.07, math.log(odds))

    def naive(_: Tensor, student: Tensor) -> Tensor:
        rows = torch.cat([index[:, None], others], 1)
        picked = bank.to(student).index_select(0, rows.view(-1)).view(64, negatives + 1, width)
        scores = torch.exp(torch.bmm(picked, student.view(64, width, 1)).squeeze(2) / 0.07)
        yes, no = scores[:, 0], scores[:, 1:]
        return -(torch.log(yes / (yes + odds)).sum() + torch.log(odds / (no + odds)).sum()) / 64

    return ours, naive


def unit_embeddings() -> tuple[Tensor, Tensor]:
    """Returns embeddings of width 128 and unit length."""
    theirs, own = (F.normalize(torch.randn(64, 128), dim=1) for _ in range(2))
    return theirs, own.requires_grad_()


def attention_transfer(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean square of normalised attention."""
    own, theirs = (F.normalize(x.pow(2).mean(1).view(len(x), -1)) for x in (student, teacher))
    return (own - theirs).pow(2).mean()


def nst(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared polynomial kernel of all pairs of channels, held at once."""
    own, theirs = (F.normalize(x.view(*x.shape[:2], -1), dim=2) for x in (student, teacher))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean()

    with torch.no_grad():
        fixed = kernel(theirs, theirs)
    return fixed + kernel(own, own) - 2 * kernel(own, theirs)


def fsp(teacher: Tensor, student: Tensor) -> Tensor:
    """Products of all pairs of channels, held at once; a map stands for top and bottom."""
    own, theirs = (x.view(*x.shape[:2], -1) for x in (student, teacher))
    with torch.no_grad():
        fixed = (theirs.unsqueeze(1) * theirs.unsqueeze(2)).mean(-1)
    return ((own.unsqueeze(1) * own.unsqueeze(2)).mean(-1) - fixed).pow(2).mean()


def flow_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """The same from Gram matrices."""
    flow = map_statistics.flow
    return (flow(student, student) - flow(teacher, teacher)).pow(2).mean()


def vid(teacher: Tensor, student: Tensor) -> Tensor:
    """Negative log-likelihood entry by entry; every variance is 5."""
    variance = teacher.new_full((1, teacher.shape[1], 1, 1), 5.0)
    return (0.5 * ((student - teacher) ** 2 / variance + torch.log(variance))).mean()


def ft(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean absolute difference of normalised factors."""
    return F.l1_loss(*(F.normalize(x.view(len(x), -1)) for x in (student, teacher)))


def ab(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared misses of the margin, one product of masks a side of zero."""
    off_too_high = (student + 1).pow(2) * ((student > -1) & (teacher <= 0)).float()
    on_too_low = (student - 1).pow(2) * ((student <= 1) & (teacher > 0)).float()
    return (off_too_high + on_too_low).sum() / len(student)


CASES: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], Callable[[], tuple[Loss, Loss]]]] = {
    "kd": (logits, lambda: (lambda t, s: 16 * distributions.softened_kl(t, s, 4.0), kd)),
    "sp": (maps, lambda: (relations.gram_distance, sp)),
    "sp pooled": (embeddings, lambda: (relations.gram_distance, sp)),
    "pkt": (embeddings, lambda: (relations.neighbour_divergence, pkt)),
    "cc": (embeddings, lambda: (lambda t, s: relations.congruence_distance(t, s, 0.4), cc)),
    "rkd distance": (embeddings, lambda: (relations.distance_distance, rkd_distance)),
    "rkd angle 64": (embeddings, lambda: (relations.angle_distance, rkd_angle)),
    "rkd angle 128": (lambda: embeddings(128), lambda: (relations.angle_distance, rkd_angle)),
    "rkd angle 256": (lambda: embeddings(256), lambda: (relations.angle_distance, rkd_angle)),
    "dark_rank": (embeddings, lambda: (ranking.ranking_loss, dark_rank)),
    "crd": (unit_embeddings, crd),
    "attention_transfer": (maps, lambda: (lambda t, s: attention.attention_distance(s, t), attention_transfer)),
    "nst": (maps, lambda: (lambda t, s: map_statistics.channel_mmd(s, t), nst)),
    "fsp": (maps, lambda: (flow_distance, fsp)),
    "vid": (maps, lambda: (lambda t, s: surprise(t, s, t.new_full((t.shape[1],), 5.0)), vid)),
    "ft": (maps, lambda: (lambda t, s: factor_distance(s, t), ft)),
    "ab": (maps, lambda: (boundary_distance, ab)),
}
"""Name: (tensors to compare, both forms of the loss)."""


def seconds(loss: Loss, teacher: Tensor, student: Tensor) -> float:
    """Returns the CPU time of one forward and backward."""
    start = time.process_time()
    torch.autograd.grad(loss(teacher, student), student)
    return time.process_time() - start


def answer(loss: Loss, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Returns value and gradient in float64."""
    value = loss(teacher, student)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach().double(), gradient.double()


def apart(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> list[float]:
    """Returns the largest difference of values and of gradients, each over the largest entry of the second."""
    return [float(f"{float((a - b).abs().max() / b.abs().max()):.1e}") for a, b in zip(one, two)]


def exactness(name: str) -> dict[str, list[float]]:
    """Compares both forms with each other and with the public form in float64; of maps a batch of 8 is enough."""
    torch.manual_seed(0)
    tensors, forms = CASES[name]
    (teacher, student), (ours, naive) = tensors(), forms()
    if student.ndim == 4:
        teacher, student = teacher[:8], student[:8].detach().requires_grad_()
    wide = teacher.double(), student.detach().double().requires_grad_()
    found, public = answer(ours, teacher, student), answer(naive, teacher, student)
    exact, found64 = answer(naive, *wide), answer(ours, *wide)
    return {
        "ours_to_public_fp32": apart(found, public),
        "ours_to_fp64": apart(found, exact),
        "public_to_fp64": apart(public, exact),
        "ours_to_public_fp64": apart(found64, exact),
    }


def memory(name: str, which: int) -> float:
    """Returns the MB that one forward and backward takes at its peak, beside the tensors; run in a fresh process."""
    torch.manual_seed(0)
    tensors, forms = CASES[name]
    (teacher, student), loss = tensors(), forms()[which]
    small = student[:2].detach().requires_grad_() if name != "crd" else student
    torch.autograd.grad(loss(teacher[: len(small)], small), small)  # what a first call takes for itself
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    torch.autograd.grad(loss(teacher, student), student)
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def in_fresh_process(name: str, which: int) -> float:
    """Returns `memory` of another process."""
    command = [sys.executable, __file__, "--memory", name, str(which)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure(name: str) -> dict[str, object]:
    """Runs both forms in turn, either of them first."""
    torch.manual_seed(0)
    tensors, forms = CASES[name]
    (teacher, student), both = tensors(), forms()
    for loss in both:
        seconds(loss, teacher, student)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS
    while len(times) < ROUNDS and (len(times) < 6 or time.perf_counter() < end):
        order = (0, 1) if len(times) % 2 else (1, 0)
        pair = {which: seconds(both[which], teacher, student) for which in order}
        times.append((pair[0], pair[1]))
    one, two = (statistics.median(column) for column in zip(*times))
    low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
    return {
        "loss": name,
        "shape": list(student.shape),
        "ours_cpu_ms": round(1e3 * one, 3),
        "public_cpu_ms": round(1e3 * two, 3),
        "speed_up": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "asked": ASKED.get(name, 1),
        "rounds": len(times),
        "exact": exactness(name),
        "peak_mb": {"ours": in_fresh_process(name, 0), "public": in_fresh_process(name, 1)},
    }


def scaling() -> dict[str, float]:
    """Returns the peak MB of our angles by batch size: quadratic, where all triplets would be cubic."""
    found = {}
    for batch in (128, 256, 512, 1024):
        CASES[f"rkd angle {batch}"] = (lambda batch=batch: embeddings(batch), CASES["rkd angle 64"][1])
        found[str(batch)] = in_fresh_process(f"rkd angle {batch}", 0)
    return found


def main() -> None:
    """Measures every loss and writes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(CASES), metavar="NAME")
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "WHICH"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        name, which = options.memory
        if name.startswith("rkd angle "):
            CASES[name] = (lambda: embeddings(int(name.split()[-1])), CASES["rkd angle 64"][1])
        print(memory(name, int(which)))
        return
    rows = []
    for name in options.only or CASES:
        rows.append(measure(name))
        print(json.dumps(rows[-1]), flush=True)
    report = {"benchmark": "distillation_losses", "threads": 1, "versions": versions(), "rows": rows}
    report["command"] = f"python benchmarks/distillation_losses.py --out {options.out.name if options.out else ''}"
    report["rkd_angle_peak_mb_by_batch"] = scaling()
    print(report["rkd_angle_peak_mb_by_batch"])
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
