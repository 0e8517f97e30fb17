#!/bin/sh
# Run once by the Postgres image, on an empty volume: the service's own role, which is no superuser, and its database.
set -eu
psql --no-psqlrc --quiet -v ON_ERROR_STOP=1 -v password="$(cat "${ISTHMUS_ROLE_PASSWORD_FILE:?}")" \
    --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
CREATE ROLE isthmus LOGIN PASSWORD :'password';
CREATE DATABASE isthmus OWNER isthmus;
SQL
