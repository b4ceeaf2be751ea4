# One image for both sides: `serve` makes it a cloud, `train` an edge.
#
#   docker build --build-arg BASE_IMAGE=python:3.11-slim -t tightbeam .
#
# On PyPI torch for Linux comes with CUDA, several gigabytes. For CPUs only, add:
#   --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /src
RUN python -m pip install --no-cache-dir torch==2.13.0
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY cli cli
COPY cloud cloud
COPY common common
COPY edge edge
COPY federation federation
COPY proto proto
COPY simulations simulations
RUN python -m pip install --no-cache-dir -c constraints.txt .

# Any user may run it, root need not: compose takes the one who owns the mounted certificates and runs.
RUN mkdir -m 1777 /cache
ENV HOME=/tmp TIGHTBEAM_CACHE=/cache
WORKDIR /srv
USER 10001:10001
ENTRYPOINT ["tightbeam"]
CMD ["--help"]
