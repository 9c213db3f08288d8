from llcompile.kernels.triton.description import *  # TEMPORARY
from llcompile.kernels.triton.description import Correction, Decay, Description, describe, describe_step
