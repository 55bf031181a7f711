"""What the programs that need a GPU share; without one they run at toy sizes, and judge correctness only.

Importing this first turns Triton's interpreter on where there is no GPU: Triton must know before it is imported.
"""

import torch

from configs import env

if not torch.cuda.is_available():
    env.set_variables({"TRITON_INTERPRET": "1"})
