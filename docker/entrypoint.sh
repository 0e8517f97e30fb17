#!/bin/sh
# Secrets come as files: NAME_FILE names the file that holds the value of NAME. Then the command takes this process's place.
set -eu
for name in ISTHMUS_DATABASE_URL ISTHMUS_DATABASE_DIRECT_URL; do
    eval "file=\${${name}_FILE:-}"
    if [ -n "$file" ]; then
        value=$(cat "$file")
        export "$name=$value"
    fi
done
exec "$@"
