"""``python -m flows`` is ``overnight``."""

from flows.cli import app

if __name__ == "__main__":
    app(prog_name="overnight")
