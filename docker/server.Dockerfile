# The service: API, coordinator and migrations. Build it from the root of the repository:
#     docker build -f docker/server.Dockerfile -t isthmus-server .

FROM python:3.11.13-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/isthmus
WORKDIR /src
COPY sdk ./sdk
COPY pyproject.toml ./
COPY app ./app
COPY migrations ./migrations
RUN /opt/isthmus/bin/python -m pip install ./sdk .

FROM python:3.11.13-slim-bookworm
RUN groupadd --gid 10001 isthmus \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin isthmus \
    && install -d -o isthmus -g isthmus -m 0700 /var/lib/isthmus
COPY --from=build /opt/isthmus /opt/isthmus
COPY --chmod=0755 docker/entrypoint.sh docker/coordinator_health.py /usr/local/lib/isthmus/
ENV PATH=/opt/isthmus/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ISTHMUS_ENVIRONMENT=production \
    ISTHMUS_HOST=0.0.0.0 \
    ISTHMUS_DATA_DIR=/var/lib/isthmus
WORKDIR /var/lib/isthmus
USER 10001:10001
EXPOSE 8400
ENTRYPOINT ["/usr/local/lib/isthmus/entrypoint.sh"]
CMD ["isthmus-server", "serve", "--no-migrate"]
