# TEMPORARY
import ctypes, hashlib, os, subprocess
import torch
def library(source, name):
    T = os.path.dirname(torch.__file__)
    h = hashlib.sha256(source.encode()).hexdigest()[:12]
    p = f"/tmp/fzd/so/{name}_{h}"
    os.makedirs("/tmp/fzd/so", exist_ok=True)
    if not os.path.exists(p + ".so"):
        open(p + ".cpp", "w").write(source)
        subprocess.run(["g++", "-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-g1", f"-I{T}/include", p + ".cpp", "-o", p + f".so.tmp{os.getpid()}", f"-L{T}/lib", "-ltorch_cpu", "-lc10"], check=True)
        os.replace(p + f".so.tmp{os.getpid()}", p + ".so")
    return ctypes.CDLL(p + ".so")
