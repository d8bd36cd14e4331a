# syntax=docker/dockerfile:1
# GPU image: NVIDIA's PyTorch container (torch, Transformer Engine, NCCL), then megatron-core, then this package.
#
#   docker build -t megatron_steel .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -it -v "$PWD/runs:/opt/megatron_steel/runs" megatron_steel \
#     bash examples/pretrain_1b.sh
#
# Not built by our tests (they have no container engine): the checks below fail the build instead of a later run when
# another tag brings versions that do not fit. Tags and contents: NVIDIA's "PyTorch Release Notes".
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

# The container pins all its packages for pip; those pins contradict ours for packages that do not touch torch.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# megatron-core 0.16.1 takes Transformer Engine >= 2.9, < 2.12 (its own metadata); the container's is compiled for its
# torch and is never replaced.
RUN python - <<'EOF'
from importlib.metadata import version
from packaging.version import Version

torch, engine = version("torch"), version("transformer_engine")
print(f"torch {torch}, Transformer Engine {engine}")
if not Version("2.9") <= Version(Version(engine).base_version) < Version("2.12"):
    raise SystemExit(f"Transformer Engine {engine} is not in [2.9, 2.12): choose another tag with --build-arg BASE=...")
EOF

# Apex is optional: megatron-core uses it for fused kernels where Transformer Engine has none, and says so when it is
# absent. It must be compiled against the container's torch:
#   docker build --build-arg WITH_APEX=1 ...
ARG WITH_APEX=0
RUN if [ "$WITH_APEX" = 1 ]; then \
      APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation --no-deps git+https://github.com/NVIDIA/apex.git; \
    fi

# Packages that depend on torch come without their dependencies, so that pip cannot replace the container's torch; the
# others come with theirs. The list is setup.cfg's; the last check below finds one that was forgotten.
WORKDIR /opt/megatron_steel
COPY constraints.txt ./
RUN grep -vE '^(torch|numpy|triton)==' constraints.txt > /opt/constraints.txt \
 && pip install --no-deps -c /opt/constraints.txt megatron-core accelerate \
 && pip install -c /opt/constraints.txt gigatoken jinja2 nltk numpy orjson psutil pyarrow PyYAML safetensors sentencepiece \
      tiktoken tokenizers tqdm transformers tyro tensorboard wandb pytest pytest-timeout hypothesis

COPY . .
RUN pip install --no-deps --no-build-isolation -e . \
 && python -c "import megatron.core, megatron_steel.pretrain, megatron_steel.finetune, megatron_steel.preference, \
      megatron_steel.model.build, tools.preprocess_data, torch, triton; assert torch.version.cuda"

# examples/*.sh use this interpreter as it is and install nothing.
ENV STEEL_PYTHON=/usr/bin/python3
