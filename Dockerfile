# CPU:   docker build -t mtlrec --build-arg TORCH_INDEX=... .
# CUDA:  docker build -t mtlrec:gpu --build-arg EXTRA=gpu .
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRA=cpu
ARG TORCH_INDEX=

RUN useradd --create-home --uid 1000 mtlrec
WORKDIR /opt/mtlrec
# Dependencies and sources together: the install script is one step, and its stamp covers both.
COPY pyproject.toml requirements-cpu.txt README.md LICENSE ./
COPY .ci/install .ci/install
COPY mtlrec mtlrec
RUN VENV=/opt/venv EDITABLE=0 TORCH_INDEX="${TORCH_INDEX}" PIP_NO_CACHE_DIR=1 .ci/install "${EXTRA}" \
    && rm -rf /opt/mtlrec/*
ENV PATH=/opt/venv/bin:${PATH} PYTHONUNBUFFERED=1

USER mtlrec
WORKDIR /home/mtlrec
# Ray starts by `ray`, everything else by `mtlrec`; a cluster's own start command replaces this one.
CMD ["mtlrec", "doctor"]
