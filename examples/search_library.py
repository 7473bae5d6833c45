"""Search as a library: index a folder of pictures, then ask it in words.

    python examples/search_library.py PHOTOS/ "a red circle"
"""

import sys

from mm.recipes.search.index import index_folder
from mm.recipes.search.query import nearest
from mm.recipes.search.table import Index


def main(folder: str, question: str, table: str = "pictures.lance", model: str = "emoji_clip") -> None:
    counts, others = index_folder(folder, table, model)          # again: only what changed
    print(f"{counts}; {others} files are no pictures")
    for match in nearest(Index.open(table), question, top=3):
        print(f"{match.score:.3f}  {match.path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
