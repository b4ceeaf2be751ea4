# One image for both sides: `serve` makes it a cloud, `train` an edge, `flower-supernode` a node of a federation.
#
#   docker build -t tightbeam:0.1.0 .                          # torch for CPUs, never the one with CUDA
#   docker build -t tightbeam:0.1.0-cuda --build-arg TORCH=2.13.0 --build-arg TORCH_INDEX= .
#
# A tag can move, a digest cannot: --build-arg BASE_IMAGE=python:3.11-slim@sha256:... (docs/deployment.md).
# `make containers` builds it too, on a base made of Debian packages where no registry is reached.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS requirements
ARG EXTRAS="postgres privacy"
WORKDIR /build
COPY pyproject.toml ./
RUN python3 -c "import sys, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
print(*sum((extras[name] for name in sys.argv[1:]), project['dependencies']), sep='\n')" \
    ${EXTRAS} > requirements.txt

FROM ${BASE_IMAGE} AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY cli cli
COPY cloud cloud
COPY common common
COPY edge edge
COPY federation federation
COPY federation federation
COPY proto proto
COPY simulations simulations
RUN python3 -m venv /tools && /tools/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
# What changes least comes first: a new version of tightbeam is a new layer of a few megabytes.
ARG TORCH=2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_EXTRA_INDEX_URL=""
RUN python3 -m venv /opt/tightbeam \
    && PIP_EXTRA_INDEX_URL="${TORCH_INDEX} ${PIP_EXTRA_INDEX_URL}" \
       /opt/tightbeam/bin/pip install --no-cache-dir "torch==${TORCH}" \
    && cd /opt/tightbeam/lib/python3.*/site-packages/torch && rm -rf include test \
    && find bin -mindepth 1 ! -name torch_shm_manager -delete
COPY constraints.txt /opt/tightbeam/
COPY --from=requirements /build/requirements.txt /opt/tightbeam/
RUN /opt/tightbeam/bin/pip install --no-cache-dir \
    -c /opt/tightbeam/constraints.txt -r /opt/tightbeam/requirements.txt \
    && cd /opt/tightbeam/lib/python3.*/site-packages \
    && find matplotlib scipy sympy -name tests -type d -prune -exec rm -r {} +
COPY --from=wheel /wheels /tmp/wheels
RUN /opt/tightbeam/bin/pip install --no-cache-dir --no-deps --no-index /tmp/wheels/*.whl

# Any user may run it, root need not: compose takes the one who owns the mounted certificates and runs.
RUN mkdir -m 1777 /cache
ENV HOME=/tmp PATH=/opt/tightbeam/bin:$PATH TIGHTBEAM_CACHE=/cache
LABEL org.opencontainers.image.title="tightbeam" \
      org.opencontainers.image.description="Fine-tuning against a frozen backbone that stays in the cloud" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
WORKDIR /srv
USER 10001:10001
ENTRYPOINT ["tightbeam"]
CMD ["--help"]
