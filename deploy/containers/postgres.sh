#!/bin/sh
# Starts Debian's PostgreSQL as the image on Docker Hub starts: a database on first use, and passwords but locally.
set -eu
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
if ! test -e "$PGDATA/PG_VERSION"; then
    initdb --pgdata="$PGDATA" --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth=trust \
        --encoding=UTF8 --locale=C.UTF-8
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    echo "CREATE DATABASE $POSTGRES_USER" | postgres --single -D "$PGDATA" postgres
fi
exec postgres -D "$PGDATA" -h '*' -k /tmp
