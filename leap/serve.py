"""An OpenAI-compatible server for packed models: transformers' own, which knows sparse checkpoints from here on.

    python -m leap.serve packed/ --port 8000

All options are those of ``transformers serve``; it needs ``pip install "transformers[serving]"``.
"""

from __future__ import annotations

import sys

from transformers.utils.import_utils import is_serve_available


def main(arguments: list[str]) -> None:
    """Serve until interrupted. Exits with code 2 where the packages that a server needs are missing."""
    if not is_serve_available():
        print('leap.serve needs more packages: pip install "transformers[serving]"', file=sys.stderr)
        raise SystemExit(2)
    from transformers.cli.transformers import app

    app(["serve", *arguments], prog_name="python -m leap.serve")


if __name__ == "__main__":
    main(sys.argv[1:])
