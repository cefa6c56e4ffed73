"""``python -m seamarkd.cli``: the ``seamark`` command without its script."""

from seamarkd.cli.main import main

main()
