"""Make pairs for UNO from nothing but a text-to-image model, and judge them.

python -m iclora.curate --out runs/factory --count 40                  diptychs, cut and filtered: pairs.json
python -m iclora.curate --out runs/factory --dino 0.8                  other thresholds; scores are kept
python -m iclora.curate --out runs/factory --where "dino > 0.7 and judge >= 3"
python -m iclora.curate --out runs/factory --lora YOURS.safetensors --detector YOURS     stage II: pairs-2.json
torchrun --nproc-per-node 8 -m iclora.curate ...                       items are shared among processes
"""

import sys

from ..cli import guard, note, parse
from .chain import curate
from .options import CurateConfig


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return the exit status: 0 done, 2 a mistake (one line on stderr), 130 interrupted."""
    return guard(lambda: curate(parse(CurateConfig, argv, __doc__, "python -m iclora.curate"), note))


if __name__ == "__main__":
    sys.exit(main())
