# `make base-image` replaces the digest with the newest one (docs/image.md).
ARG PYTHON_IMAGE=python:3.13-slim@sha256:70729b46c69b4f1e97c4822c1af3df53a1476cf5ddc6c087c0c10bc3a5678c2f

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements.lock ./
RUN pip wheel --no-deps --only-binary :all: --require-hashes --wheel-dir wheels --requirement requirements.lock
RUN python -m venv --without-pip /opt/klaviyo-worker \
    && pip --python /opt/klaviyo-worker/bin/python install --no-deps --no-index --find-links wheels --requirement requirements.lock
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY worker worker
# --no-index: the build tools and the requirements of setup.cfg come from the lock.
# klaviyo-api requires setuptools but does not import it.
# hadolint ignore=DL3013
RUN pip wheel --no-deps --no-index --find-links wheels --wheel-dir wheels . \
    && pip --python /opt/klaviyo-worker/bin/python install --no-index --find-links wheels 'klaviyo-worker[push,sqs,servicebus]' \
    && pip --python /opt/klaviyo-worker/bin/python uninstall --yes setuptools

FROM ${PYTHON_IMAGE}
# The home directory holds the embedded queue. A volume there belongs to the user. Nothing else is written.
RUN groupadd --gid 10001 klaviyo-worker \
    && useradd --uid 10001 --gid 10001 --no-log-init --home-dir /var/lib/klaviyo-worker --shell /usr/sbin/nologin klaviyo-worker \
    && install --directory --owner 10001 --group 10001 /var/lib/klaviyo-worker
COPY --from=build /opt/klaviyo-worker /opt/klaviyo-worker
# KLAVIYO_WORKER_HTTP_HOST: probes and scrapes come from outside the container.
ENV PATH=/opt/klaviyo-worker/bin:$PATH HOME=/var/lib/klaviyo-worker PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    KLAVIYO_WORKER_HTTP_HOST=0.0.0.0
USER 10001:10001
EXPOSE 9090
# No HEALTHCHECK: the orchestrator probes /livez and /readyz, and `run --once` serves neither.
ENTRYPOINT ["klaviyo-worker"]
CMD ["run"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="klaviyo-worker" \
    org.opencontainers.image.description="Keeps Klaviyo in step with commercetools" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}"
