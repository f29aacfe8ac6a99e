"""Says which modules import each other in a circle, lazily or for types alone too; a part of `make lint`.

import-linter looks for circles between the packages of one package, and guest/linux is on both sides of
guest/inspect.py on purpose: what it reads of kernels and menus is below, the fixers are above.
"""

from __future__ import annotations

import sys
from graphlib import CycleError, TopologicalSorter

import grimp


def main() -> int:
    """Print the first circle, if there is one; the exit status."""
    graph = grimp.build_graph("hyper2kvmd", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        print(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
