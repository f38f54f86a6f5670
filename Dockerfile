# medseg in a container. CPU by default:
#   docker build -t medseg .
# CUDA, with the index of the CUDA version that the driver supports (pytorch.org, "Get started", lists them):
#   docker build -t medseg:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# How it is run, and what of it was checked: docs/docker.md
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/medseg
WORKDIR /src
# torch in a layer of its own: it is most of the image, and changes least.
COPY constraints.txt constraints-torch.txt ./
RUN /opt/medseg/bin/python -m pip install --extra-index-url "${TORCH_INDEX}" \
    -c constraints.txt -c constraints-torch.txt torch
COPY . .
RUN /opt/medseg/bin/python -m pip install -c constraints.txt -c constraints-torch.txt .

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/medseg /opt/medseg
RUN useradd --create-home --uid 1000 medseg && install -d -o medseg -g medseg /work
ENV PATH=/opt/medseg/bin:${PATH} PYTHONUNBUFFERED=1
USER medseg
WORKDIR /work
ENTRYPOINT ["medseg"]
CMD ["--help"]
