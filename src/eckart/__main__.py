"""``python -m eckart`` is the command ``eckart``; ``torchrun -m eckart …`` starts it on many processes."""

from __future__ import annotations

from eckart.cli import main

if __name__ == "__main__":
    main()
