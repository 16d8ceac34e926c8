"""Make tests/fixtures again once the bundled base is another one: python tests/make_fixtures.py [PART ...]

The commands are run by the code as it was before the redesign, on the weights of today: its files and pictures must
still be read, followed and equalled. Parts are loras, effects, features, begun, and the names of single pictures.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cli"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from blackbox import FIXTURES, ROOT, metrics  # noqa: E402
from test_stored import CAPTIONS, COMMANDS, OLD, OLD_RUNS, ONE_LINEAR, RECORDS  # noqa: E402

CODE = "edc2ca6"  # the last commit before the redesign
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
LORAS, PICTURES = FIXTURES / "loras", FIXTURES / "pictures"
SKETCH = ["--data", "sets/sketch", "--condition", "clean", "--rank", "2"]
UNO = ["--method", "uno", "--data", "tests/fixtures/pairs/pairs.json", "--rank", "1", "--targets", "uno"]
TRAININGS = {
    "clean": [*SKETCH, "--targets", "double_blocks.0.img_attn.qkv,double_blocks.1.txt_mlp.0,single_blocks.1.linear1"],
    "tokens": [*SKETCH, "--targets", "double_blocks.0.img_attn.qkv,double_blocks.1.img_attn.proj", "--concat", "tokens",
               "--text", "panel"],
    "uno": [*UNO, "--offset", "h", "--offset-scale", "2", "--posterior", "mean", "--ref-size", "48"],
    "alone": [*UNO, "--reference-attention", "alone"],
}  # fmt: skip
SHORT = ["--steps", "12", "--lr", "0.03", "--batch", "4", "--warmup", "0", "--ema", "0", "--sample-every", "0"]
FORWARDS = """
import sys, torch
from safetensors.torch import load_file, save_file
from model.lora import load_lora, merge
from model.weights import load_flux
path, *loras = sys.argv[1:]
given = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("out.")}
found = dict(given)
for name in ["base", *loras]:
    flux = load_flux("weights/tiny/flux1-tiny.safetensors", dtype=torch.float32)
    if name != "base":
        load_lora(flux, f"tests/fixtures/loras/{name}.safetensors")
        merge(flux)
    with torch.no_grad():
        found[f"out.{name}"] = flux(**given)
save_file(found, path)
"""
FEATURES = """
import sys, torch
from safetensors.torch import save_file
from model.text import load_text_encoders
from model.weights import find_model
path, *captions = sys.argv[1:]
txt, vec = load_text_encoders(find_model("tiny"), "cpu", torch.float32).encode(captions, 40)
save_file({"txt": txt[:, ::4].contiguous(), "vec": vec}, path)
"""


def old(code: Path, *argv: object) -> list[str]:
    """A command line of the old code."""
    return [sys.executable, *(str(word).replace(str(ROOT), str(code)) for word in argv)]


def run(code: Path, *argv: object) -> None:
    subprocess.run(old(code, *argv), cwd=code, env=ENVIRONMENT, check=True)


def make_loras(code: Path) -> None:
    for name, flags in TRAININGS.items():
        run(code, "train.py", *flags, *SHORT, "--out", code / "runs" / name)
        shutil.copyfile(code / "runs" / name / "lora.safetensors", LORAS / f"{name}.safetensors")
    clean, kohya = (LORAS / f"{name}.safetensors" for name in ("clean", "kohya"))
    kohya.unlink(missing_ok=True)
    run(code, "-m", "iclora.convert", clean, kohya, "--to", "kohya")


def make_effects(code: Path) -> None:
    run(code, "-c", FORWARDS, FIXTURES / "effects.safetensors", *TRAININGS, "kohya")


def make_features(code: Path) -> None:
    run(code, "-c", FEATURES, FIXTURES / "text.safetensors", *CAPTIONS)


def make_begun(code: Path) -> None:
    """Runs that are killed after step 5, between two checkpoints."""
    for name, flags in OLD_RUNS.items():
        argv = old(code, "train.py", *flags, *ONE_LINEAR, *OLD, "--holdout", "0.2", "--out", code / "runs" / name)
        while True:
            shutil.rmtree(code / "runs" / name, ignore_errors=True)
            process, noted = subprocess.Popen(argv, cwd=code, env=ENVIRONMENT), code / "runs" / name / "metrics.jsonl"
            while process.poll() is None and not (noted.exists() and noted.read_bytes().count(b"\n") >= 5):
                time.sleep(0.001)
            process.kill()
            process.wait()
            if len(metrics(noted.parent)) == 5:
                break
        for path in (FIXTURES / "begun" / name).iterdir():
            shutil.copyfile(noted.parent / path.name, path)


def make_picture(code: Path, name: str) -> None:
    """One stored picture, and its record if there is one."""
    flags = ["--grid", "2x2", "--mask", "3"] if name == "first" else COMMANDS[name][2]
    out = code / "out" / name
    run(code, "sample.py", *flags, "--device", "cpu", "--out", out)
    shutil.copyfile(out / "0001.png", PICTURES / f"{name}.png")
    if name in RECORDS:
        text = (out / "0001.json").read_text().replace(str(code), "{root}").replace(str(ROOT), "{root}")
        (FIXTURES / "records" / f"{name}.json").write_text(json.dumps(json.loads(text), indent=2) + "\n")


def main(argv: list[str]) -> int:
    parts = {"loras": make_loras, "effects": make_effects, "features": make_features, "begun": make_begun}
    names = [*parts, "first", *COMMANDS]
    if set(argv) - set(names):
        sys.exit(f"choose of {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder)
        packed = subprocess.run(["git", "archive", CODE], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x"], cwd=code, input=packed, check=True)
        for name in ("weights", "sets", "tests"):
            shutil.rmtree(code / name)
            (code / name).symlink_to(ROOT / name)
        for name in argv or names:
            parts[name](code) if name in parts else make_picture(code, name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
