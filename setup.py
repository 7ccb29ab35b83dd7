"""Installs the modules and, where nvcc is found, kernels.cu compiled to libkernels.so beside them.

pip install -e .                   python setup.py build_ext --inplace: only the library
USE_CUDA=auto (default) | 0 | 1    compile if that works | never | or fail
CUDA_ARCHS=80,90 (default)         8.0 is an A100, 9.0 an H100; newer GPUs translate the last"""

from os import environ, path, pathsep
from pathlib import Path
from shutil import which

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

USE = environ.get("USE_CUDA", "auto")
if USE not in ("auto", "0", "1"):
    raise SystemExit(f"setup.py: USE_CUDA={USE}: give auto, 0 or 1")


class Build(build_ext):
    def get_ext_filename(self, name):
        return f"{name}.so"  # kernels.so would not do: `import kernels` takes it for the module

    def build_extension(self, ext):
        places = environ.get("PATH", ""), environ.get("CUDA_HOME", "") + "/bin"
        if not (nvcc := which("nvcc", path=pathsep.join([*places, "/usr/local/cuda/bin"]))):
            raise CompileError("no nvcc on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")
        archs = environ.get("CUDA_ARCHS", "80,90").split(",")
        codes = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in archs]
        output = self.get_ext_fullpath(ext.name)
        self.mkpath(path.dirname(output))
        flags = "-O3", "--threads=0", "-shared", "-Xcompiler=-fPIC", "-o", output
        self.spawn([nvcc, *codes, *flags, *ext.sources])


setup(
    name="memory3",
    version="0.1",
    python_requires=">=3.11",
    cmdclass=dict(build_ext=Build),
    py_modules=sorted(file.stem for file in Path(".").glob("*.py") if file.stem != "setup"),
    packages=["views", "experiments", "benchmarks"],
    package_data=dict(views=["memory.html"]),
    install_requires=["torch", "numpy", "faiss-cpu", "tiktoken", "tqdm"],
    ext_modules=[Extension("libkernels", ["kernels.cu"], optional=USE == "auto")] * (USE != "0"),
)
