"""Persistent homology in a process of its own: a box that homcloud cannot handle aborts the whole process.

Reads one JSON object a line on stdin: ``points`` (n rows x, y, z, weight; the weight is a squared radius) and the sides
``box`` of the periodic box. Writes one a line on stdout: ``pairs``, the (birth, death) pairs of degrees 0, 1 and 2
(squared lengths), or ``reason``, why there are none. The first line of all says that it is ready.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np


def main() -> None:
    """Answer until stdin ends."""
    import homcloud.interface as hc

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            diagrams = hc.PDList.from_alpha_filtration(
                np.array(request["points"]),
                weight=True,
                squared=True,
                periodicity=tuple((0.0, side) for side in request["box"]),
                save_suppl_info=False,
            )
            pairs = [diagrams.dth_diagram(degree) for degree in range(3)]
            reply: dict[str, Any] = {"pairs": [np.stack([p.births, p.deaths], axis=1).tolist() for p in pairs]}
        except Exception as error:  # whatever homcloud raises is the crystal's reason
            reply = {"reason": f"homcloud: {' '.join(str(error).split()) or type(error).__name__}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
