# The agent beside an organization's data. Build it from the root of the repository:
#     docker build -f docker/worker.Dockerfile -t isthmus-worker .
# For the smaller CPU build of torch, name a package index that has it: --build-arg TORCH_INDEX=...

FROM python:3.11.13-slim-bookworm AS build
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# torch first and by itself: it is by far the largest part, and nothing that follows may choose another version.
RUN python -m venv /opt/isthmus \
    && /opt/isthmus/bin/python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
WORKDIR /src
COPY sdk ./sdk
COPY worker ./worker
RUN /opt/isthmus/bin/python -m pip install torch==2.13.0 ./sdk ./worker

FROM python:3.11.13-slim-bookworm
RUN groupadd --gid 10002 isthmus-worker \
    && useradd --uid 10002 --gid 10002 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin isthmus-worker \
    && install -d -o isthmus-worker -g isthmus-worker -m 0700 /var/lib/isthmus-worker
COPY --from=build /opt/isthmus /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ISTHMUS_WORKER_CONFIG=/etc/isthmus-worker/worker.toml
WORKDIR /var/lib/isthmus-worker
USER 10002:10002
ENTRYPOINT ["isthmus-worker"]
CMD ["run"]
