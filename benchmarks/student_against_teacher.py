"""What a small student saves: parameters, bytes on disk and time, beside its teacher's.

Both answer the same batches in turn; the figure is the median of the ratios. Accuracy is in the recipe's results file.
`python benchmarks/student_against_teacher.py recipes/distillation/kd_elpv.yaml --out FILE.json`
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from hubtransfer import recipe
from hubtransfer.data import Loader
from hubtransfer.models import TransferModel
from hubtransfer.training.record import versions


def seconds(model: TransferModel, inputs: dict[str, torch.Tensor]) -> float:
    """Returns how long one forward takes."""
    began = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
    return time.perf_counter() - began


def facts(model: TransferModel) -> dict[str, int]:
    """Returns parameters, with and without tables of embeddings, and bytes of the saved weights."""
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    counts = {id(p): p.numel() for p in model.parameters()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {
        "parameters": sum(counts.values()),
        "parameters_without_embeddings": sum(n for key, n in counts.items() if key not in tables),
        "bytes_on_disk": size,
    }


def compare(path: str, batches: tuple[int, ...], rounds: int) -> dict[str, object]:
    """Returns the facts of a recipe's first teacher and student, and how many times faster the student answers."""
    # neither size nor time depends on what the teacher has learnt
    built = recipe.build(recipe.read(path, ["teacher.train=null", "teacher.seed=null"]))
    student, teacher = built.method.model.eval(), next(iter(built.method.teachers)).model.eval()
    source = next(iter(built.scenario.evaluations().values()))[0]
    found: dict[str, object] = {"teacher": facts(teacher), "student": facts(student), "times_faster": {}}
    for size in batches:
        loader = Loader(source, processor=student.processor, batch_size=size, seed=0)
        inputs = next(iter(loader.batches(0))).inputs
        for model in (student, teacher):
            seconds(model, inputs)
        pairs = [(seconds(teacher, inputs), seconds(student, inputs)) for _ in range(rounds)]
        ratios = sorted(a / b for a, b in pairs)
        found["times_faster"][f"batch of {size}"] = {  # type: ignore[index]
            "median": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "teacher_milliseconds": 1e3 * statistics.median(a for a, _ in pairs),
            "student_milliseconds": 1e3 * statistics.median(b for _, b in pairs),
        }
    return found


def main() -> None:
    """Prints and writes the comparison of every recipe named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", help="recipes whose method has a teacher")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    found = {Path(path).stem: compare(path, tuple(given.batch), given.rounds) for path in given.recipes}
    found |= {"threads": torch.get_num_threads(), "versions": versions()}  # type: ignore[dict-item]
    text = json.dumps(found, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
