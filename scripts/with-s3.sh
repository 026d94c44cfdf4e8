#!/bin/bash
# with-s3.sh SERVER... -- COMMAND...: runs COMMAND with S3 servers beside it and ends with its exit code. Installs what is
# missing; everything listens on free ports of loopback, holds no data of an earlier run, and is gone afterwards.
# SERVER is `ceph` (RADOS Gateway, Debian's; strict and quick), `moto` (checks permissions) or `garage` (checks checksums,
# has no conditional PUT; built once, in about ten minutes). COMMAND finds in its environment, of those that run:
#   ARCHIVER_TEST_S3_CA                              file with the certificate of the authority of every https below
#   ARCHIVER_TEST_CEPH, ARCHIVER_TEST_CEPH_HTTP      https://127.0.0.1:PORT, and the same gateway without TLS
#   ARCHIVER_TEST_CEPH_KEY, _SECRET                  a user who may make buckets
#   ARCHIVER_TEST_CEPH_OTHER_KEY, _SECRET            another one, who may do nothing in the buckets of the first
#   ARCHIVER_TEST_CEPH_CONF                          what radosgw-admin -c needs to make further users and keys
#   ARCHIVER_TEST_MOTO                               https://127.0.0.1:PORT
#   ARCHIVER_TEST_MOTO_KEY, _SECRET                  a user who may do everything
#   ARCHIVER_TEST_MOTO_NO_PUT_KEY, _SECRET           one who lacks s3:PutObject, and nothing else; so NO_GET (GetObject),
#                                                    NO_LIST (ListBucket), NO_DELETE (DeleteObject)
#   ARCHIVER_TEST_GARAGE                             http://127.0.0.1:PORT
#   ARCHIVER_TEST_GARAGE_KEY, _SECRET                a user who may make buckets
# The region is us-east-1 everywhere. The gateway has the storage classes STANDARD and STANDARD_IA, SSE with AES256, and
# with aws:kms by the key `archiver`; it serves BUCKET.buckets.localhost:PORT too, for which its certificate holds. Users
# whose policy allows sts:GetSessionToken get temporary keys from it.
set -euo pipefail
shopt -s inherit_errexit

servers=()
while (($#)) && [[ $1 != -- ]]; do
    [[ $1 =~ ^(ceph|moto|garage)$ ]] || { echo "with-s3: there is no server \"$1\"" >&2; exit 2; }
    servers+=("$1")
    shift
done
((${#servers[@]} && $# > 1)) || { echo 'usage: with-s3.sh SERVER... -- COMMAND...' >&2; exit 2; }
shift

scripts=$(realpath "$(dirname "${BASH_SOURCE[0]}")")

# Kept in the user's cache. Two at once would spoil each other's; the servers must not inherit the lock.
moto=$HOME/.cache/archiver/moto-5.2.5
install_moto() (
    mkdir -p "${moto%/*}"
    exec {lock}>"$moto.lock"
    flock "$lock"
    ! [[ -e $moto/whole ]] || ! "$moto/bin/python3" -c 'import moto' >/dev/null 2>&1 || exit 0
    "$scripts/requirements.sh" python3-venv
    echo "with-s3: installing ${moto##*/}, once" >&2
    rm -rf "$moto" # not whole, or its Python is gone
    python3 -m venv "$moto" >&2
    "$moto/bin/pip" install -q --disable-pip-version-check "moto[server,s3]==${moto##*-}" >&2
    touch "$moto/whole"
)
garage=$HOME/.cache/archiver/garage-2.5.0
install_garage() (
    mkdir -p "${garage%/*}"
    exec {lock}>"$garage.lock"
    flock "$lock"
    ! [[ -x $garage/bin/garage ]] || exit 0
    "$scripts/requirements.sh" gcc libc6-dev make pkg-config
    echo "with-s3: building ${garage##*/}, once; this takes about ten minutes" >&2
    env -u CARGO_TARGET_DIR cargo install garage --version "${garage##*-}" --locked --no-default-features \
        --features bundled-libs,sqlite,lmdb --root "$garage" >&2
)

"$scripts/requirements.sh" curl openssl
for server in "${servers[@]}"; do
    case $server in
        ceph) "$scripts/requirements.sh" radosgw ceph-mon ceph-osd ceph-common ;;
        moto) install_moto ;;
        garage) install_garage ;;
    esac
done

# The OS user postgres, as whom root's tests run PostgreSQL, reads the CA's certificate.
callers_umask=$(umask)
umask 077
dir=$(mktemp -d "${TMPDIR:-/tmp}/archiver-s3.XXXXXX")
chmod 711 "$dir"

# What we started and still runs is what Bash says, which reaps it: no process that got the number of an ended one.
running() { [[ " $(jobs -pr | tr '\n' ' ')" == *" $1 "* ]]; }
end() { # SIGNAL PID...
    local pid deadline=$((SECONDS + 10))
    for pid in "${@:2}"; do ! running "$pid" || kill "-$1" "$pid" 2>/dev/null || true; done
    for pid in "${@:2}"; do
        while running "$pid"; do
            ((SECONDS < deadline)) || kill -KILL "$pid" 2>/dev/null || true
            sleep 0.02
        done
    done
}
started=() command=
finish() {
    local status=$?
    trap - EXIT
    trap '' HUP INT TERM
    { # Bash tells of each
        [[ ! $command ]] || end TERM "$command"
        end KILL "${started[@]}" # nothing of theirs is to be kept
    } 2>/dev/null
    rm -rf "$dir"
    exit "$status"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAME PROGRAM ARGUMENT...: its output goes to NAME.log. It ends with us, even where nothing is left to end it.
start() {
    setpriv --pdeathsig KILL "${@:2}" >>"$dir/$1.log" 2>&1 </dev/null &
    started+=($!)
}
# await NAME CONDITION...: until it holds; NAME is the server started last.
await() {
    local deadline=$((SECONDS + 60))
    until "${@:2}" >/dev/null 2>&1; do
        if ((SECONDS >= deadline)) || ! running "${started[-1]}"; then
            echo "with-s3: $1 does not come up; the last lines of its log:" >&2
            tail -n 20 "$dir/$1.log" >&2
            exit 1
        fi
        sleep 0.02
    done
}
answers() { curl -q -sS -o "$dir/answer" --noproxy '*' --max-time 5 --cacert "$dir/ca.crt" "$@"; }
ask() { answers --fail-with-body "$@" || { tail -n 20 "$dir/answer" "$dir"/*.log >&2; exit 1; }; }

# Ports lie below those that the kernel hands out, in a block that belongs to our process number: two of us at the same
# time do not take the same one.
port=$((10240 + $$ % 2048 * 10))
free_port() { # VARIABLE
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    printf -v "$1" %d "$port"
    port=$((port + 1))
}

make_certificates() {
    local key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
    printf '%s\n' basicConstraints=CA:FALSE extendedKeyUsage=serverAuth \
        subjectAltName=DNS:localhost,DNS:buckets.localhost,DNS:*.buckets.localhost,IP:127.0.0.1 >"$dir/server.ext"
    openssl req -x509 "${key[@]}" -days 30 -keyout "$dir/ca.key" -out "$dir/ca.crt" -subj '/CN=archiver tests' \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign &&
        openssl req "${key[@]}" -keyout "$dir/server.key" -out "$dir/server.csr" -subj /CN=localhost &&
        openssl x509 -req -in "$dir/server.csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -CAcreateserial -days 30 \
            -out "$dir/server.crt" -extfile "$dir/server.ext" &&
        chmod 644 "$dir/ca.crt"
}

# One monitor, one OSD that holds its objects in memory, and the gateway; no authentication between these.
ceph_conf() { # MONITOR HTTP HTTPS
    cat <<END
[global]
fsid = $(</proc/sys/kernel/random/uuid)
mon host = [v2:127.0.0.1:$1/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
run dir = $dir/ceph
log file = $dir/ceph/\$name.log
admin socket = $dir/ceph/\$name.asok
pid file = $dir/ceph/\$name.pid
crash dir = $dir/ceph
mon data = $dir/ceph/mon
mon cluster log file = $dir/ceph/cluster.log
mon data avail warn = 1
mon data avail crit = 1
osd data = $dir/ceph/osd
osd objectstore = memstore
memstore device bytes = 17179869184
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
# As shipped, each change of the maps waits for seconds for others to join it, and clients look every five seconds.
paxos propose interval = 0.02
paxos min wait = 0.01
objecter tick interval = 0.1
[client]
# As shipped, that is "secure", which waits for ever where there are no keys.
ms mon client mode = crc secure
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$2 ssl_endpoint=127.0.0.1:$3 ssl_certificate=$dir/server.crt ssl_private_key=$dir/server.key
rgw data = $dir/ceph
rgw dns name = buckets.localhost
rgw crypt require ssl = false
rgw s3 auth use sts = true
# As shipped, the other way round: then a wrong secret is told as AccessDenied.
rgw s3 auth order = local, sts
rgw sts key = $(openssl rand -hex 8)
rgw crypt s3 kms backend = testing
rgw crypt s3 kms encryption keys = archiver=$(openssl rand -base64 32)
# What was deleted lies in memory until it is collected.
rgw gc obj min wait = 60
rgw gc processor period = 60
END
}
ceph_run() { # PROGRAM ARGUMENT...
    local status=0
    timeout --foreground 60 "$1" -c "$dir/ceph.conf" "${@:2}" 2>>"$dir/ceph.log" || status=$?
    ((status == 0)) || {
        echo "with-s3: ended with $status: $*; the last lines of the logs:" >&2
        tail -n 20 "$dir"/ceph/*.log "$dir/ceph.log" >&2
        exit 1
    }
}
launch_ceph() {
    local monitor http https uid
    free_port monitor
    free_port http
    free_port https
    unset CEPH_ARGS CEPH_CONF CEPH_KEYRING
    mkdir -p "$dir/ceph/mon" "$dir/ceph/osd"
    ceph_conf "$monitor" "$http" "$https" >"$dir/ceph.conf"
    {
        ceph_run monmaptool --create --addv a "[v2:127.0.0.1:$monitor]" "$dir/ceph/monmap"
        ceph_run osdmaptool --createsimple 1 "$dir/ceph/osdmap"
        ceph_run ceph-mon -i a --mkfs --monmap "$dir/ceph/monmap" --osdmap "$dir/ceph/osdmap"
        start ceph ceph-mon -c "$dir/ceph.conf" -i a -f
        ceph_run ceph-osd -i 0 --no-mon-config --mkfs --osd-uuid "$(</proc/sys/kernel/random/uuid)"
        start ceph ceph-osd -c "$dir/ceph.conf" -i 0 -f
        for uid in test other; do
            ceph_run radosgw-admin user create --uid "$uid" --display-name "$uid" --access-key "$uid-key" --secret-key "$uid-secret"
        done
        # The name that a request without a bucket's name in it may be for, besides the one above.
        ceph_run radosgw-admin zonegroup get >"$dir/ceph/zonegroup"
        sed -i 's/"hostnames": \[\]/"hostnames": ["localhost"]/' "$dir/ceph/zonegroup"
        ceph_run radosgw-admin zonegroup set --infile "$dir/ceph/zonegroup"
        ceph_run radosgw-admin zonegroup placement add --rgw-zonegroup default --placement-id default-placement \
            --storage-class STANDARD_IA
        ceph_run radosgw-admin zone placement add --rgw-zone default --placement-id default-placement \
            --storage-class STANDARD_IA --data-pool default.rgw.ia.data
        start ceph radosgw -c "$dir/ceph.conf" -n client.rgw -f
    } >"$dir/ceph/said"
    export ARCHIVER_TEST_CEPH=https://127.0.0.1:$https ARCHIVER_TEST_CEPH_HTTP=http://127.0.0.1:$http
    export ARCHIVER_TEST_CEPH_KEY=test-key ARCHIVER_TEST_CEPH_SECRET=test-secret
    export ARCHIVER_TEST_CEPH_OTHER_KEY=other-key ARCHIVER_TEST_CEPH_OTHER_SECRET=other-secret
    export ARCHIVER_TEST_CEPH_CONF=$dir/ceph.conf
    await ceph answers "$ARCHIVER_TEST_CEPH"
    await ceph answers "$ARCHIVER_TEST_CEPH_HTTP"
}

# Its first requests are not checked, so that users can be made; from `reset-auth` on all are.
launch_moto() {
    local https
    free_port https
    start moto "$moto/bin/moto_server" -H 127.0.0.1 -p "$https" -s -c "$dir/server.crt" -k "$dir/server.key"
    export ARCHIVER_TEST_MOTO=https://127.0.0.1:$https
    await moto answers "$ARCHIVER_TEST_MOTO/moto-api/"
    moto_user MOTO ''
    moto_user MOTO_NO_PUT s3:PutObject
    moto_user MOTO_NO_GET s3:GetObject
    moto_user MOTO_NO_LIST s3:ListBucket
    moto_user MOTO_NO_DELETE s3:DeleteObject
    ask "$ARCHIVER_TEST_MOTO/moto-api/reset-auth" --header 'Content-Type: text/plain' --data 0
}
moto_iam() { # ACTION USER PARAMETER...
    ask "$ARCHIVER_TEST_MOTO" --user none:none --aws-sigv4 aws:amz:us-east-1:iam --data Version=2010-05-08 \
        --data "Action=$1" --data "UserName=$2" "${@:3}"
}
moto_user() { # NAME LACKING
    local policy='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'
    [[ ! $2 ]] || policy=${policy/'"Action": "*"'/"\"NotAction\": \"$2\""}
    moto_iam CreateUser "$1"
    moto_iam PutUserPolicy "$1" --data PolicyName=tests --data-urlencode "PolicyDocument=$policy"
    moto_iam CreateAccessKey "$1"
    export "ARCHIVER_TEST_$1_KEY=$(sed -n 's|.*<AccessKeyId>\(.*\)</AccessKeyId>.*|\1|p' "$dir/answer")"
    export "ARCHIVER_TEST_$1_SECRET=$(sed -n 's|.*<SecretAccessKey>\(.*\)</SecretAccessKey>.*|\1|p' "$dir/answer")"
}

launch_garage() {
    local rpc http
    free_port rpc
    free_port http
    export ARCHIVER_TEST_GARAGE=http://127.0.0.1:$http
    ARCHIVER_TEST_GARAGE_KEY=GK$(openssl rand -hex 12)
    ARCHIVER_TEST_GARAGE_SECRET=$(openssl rand -hex 32)
    export ARCHIVER_TEST_GARAGE_KEY ARCHIVER_TEST_GARAGE_SECRET
    cat >"$dir/garage.toml" <<END
metadata_dir = "$dir/garage/meta"
data_dir = "$dir/garage/data"
db_engine = "lmdb"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:$rpc"
rpc_public_addr = "127.0.0.1:$rpc"
rpc_secret = "$(openssl rand -hex 32)"
[s3_api]
api_bind_addr = "127.0.0.1:$http"
s3_region = "us-east-1"
END
    GARAGE_DEFAULT_ACCESS_KEY=$ARCHIVER_TEST_GARAGE_KEY GARAGE_DEFAULT_SECRET_KEY=$ARCHIVER_TEST_GARAGE_SECRET \
        start garage "$garage/bin/garage" -c "$dir/garage.toml" server --single-node --default-access-key
    await garage answers "$ARCHIVER_TEST_GARAGE"
    await garage "$garage/bin/garage" -c "$dir/garage.toml" key allow --create-bucket "$ARCHIVER_TEST_GARAGE_KEY"
}

make_certificates 2>"$dir/openssl.log" || { cat "$dir/openssl.log" >&2; exit 1; }
export ARCHIVER_TEST_S3_CA=$dir/ca.crt
for server in "${servers[@]}"; do "launch_$server"; done

# In the background, so that a signal finds us waiting; what Bash takes from such a command is given back.
umask "$callers_umask"
env --default-signal=INT,QUIT -- "$@" <&0 &
command=$!
wait "$command"
