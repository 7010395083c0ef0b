# This project with Python 3.12 and the versions of constraints.txt. Not built yet: no test builds it.
#   docker build -t ddt .                                                          # for CPUs
#   docker build -t ddt --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .           # for NVIDIA GPUs
#   docker run --rm --gpus all --shm-size=8g -v "$PWD/runs:/ddt/runs" ddt python train.py
# BASE: an image with Ubuntu's packages and its Python 3.11 or later. PyTorch brings CUDA's libraries itself.
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch.compile needs a C++ compiler and Python's headers
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /ddt
# PyTorch first: a change of the code does not download it again. Of equal versions pip takes the
# index's own build (2.14.1+cpu); the packages that it needs are on PyPI.
COPY constraints.txt ./
RUN pip install torch torchvision -c constraints.txt --extra-index-url ${TORCH_INDEX}
COPY . .
RUN pip install -e . -c constraints.txt
CMD ["python", "train.py", "--help"]
