#!/usr/bin/env bash
# Switches the KV-cache events of a running vLLM Deployment or StatefulSet on, and labels its pods for the router.
#
# vLLM takes the setting from its command line alone (--kv-events-config, vLLM 0.9 and newer); no environment variable
# of it does this. So the container's arguments are patched, in the form in which they are found: a list of words, or
# one `sh -c "vllm serve …"` text. Whatever else is found is refused, with everything that is wrong in one go.
#
# What was there before is kept in an annotation of the workload itself and not looked up in its old ReplicaSets: those
# may be pruned, and going back to one takes back every other change of that time as well. The annotation holds only the
# fields that were changed, so --rollback restores those, and refuses when somebody else has changed them since.
set -euo pipefail

readonly UNDO=warmroute.io/kv-events-undo
readonly NAME_LABEL=model.aibrix.ai/name
readonly EVENTS_LABEL=model.aibrix.ai/kv-events-enabled
readonly PORT_LABEL=model.aibrix.ai/port
# A status that changes between our read and our write is no reason to give up.
readonly ATTEMPTS=5

readonly EXIT_KUBECTL=1 EXIT_USAGE=2 EXIT_REFUSED=3 EXIT_SILENT=4

usage() {
    cat <<'TEXT'
usage: enable-kv-events.sh [OPTION...] NAMESPACE NAME

NAME is that of a Deployment or a StatefulSet; deployment/NAME and statefulset/NAME say which.

  --dry-run            print what would change, checked by the API server, and change nothing
  --rollback           restore what this script has changed
  --verify             subscribe to one of the pods and print what it publishes
  --container NAME     the container that runs vLLM, where that cannot be seen
  --model NAME         value of the label model.aibrix.ai/name: models[].name in the router's configuration;
                       default: the label that is there, else the name under which vLLM serves its model
  --labels none        add no labels, for routers that find their pods by other means (default: aibrix)
  --ranks N            data-parallel ranks in each pod; has to agree with --data-parallel-size, which is the default
  --events-port PORT   rank r publishes on PORT + r (5557)
  --replay-port PORT   rank r replays on PORT + r (the first port after those of the events: 5558 for one rank)
  --hash-algo NAME     also set --prefix-caching-hash-algo: sha256, sha256_cbor, xxhash or xxhash_cbor
  --vllm-version X.Y   the version, where the image's tag does not tell it

With --verify:
  --seconds N          how long to listen to each rank (10)
  --image IMAGE        run warmroute from this image in a pod of its own; default: the program
                       warmroute (WARMROUTE_BIN) here, through a port-forward

Needs bash 4.4, jq 1.6 and kubectl (KUBECTL), which must be allowed to get and patch the workload; --dry-run needs
diff; --verify needs GNU timeout, and pods and pods/portforward, or with --image to create and delete a pod.

Exit codes: 0 done, or nothing to do; 1 kubectl, jq or diff failed; 2 wrong usage; 3 refused, nothing was changed;
4 --verify saw no events.
TEXT
}

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }

die() {
    local code=$1
    shift
    warn "enable-kv-events: $*"
    exit "$code"
}

refuse() { die $EXIT_REFUSED "refused: $*"; }

# Other programs' exit codes would be taken for ours.
jq() { command jq "$@" || return $EXIT_KUBECTL; }
kube() { "${KUBECTL:-kubectl}" --namespace "$namespace" "$@" || return $EXIT_KUBECTL; }

# --- options ---------------------------------------------------------------------------------------------------------

action=enable is_dry=false container='' model='' labels=aibrix ranks='' events_port=5557 replay_port='' hash_algo=''
vllm_version='' seconds=10 image=''

read_options() {
    local positional=()
    while (($# > 0)); do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --dry-run) is_dry=true ;;
        --rollback | --verify)
            [[ $action == enable ]] || die $EXIT_USAGE "--rollback and --verify exclude each other"
            action=${1#--}
            ;;
        --container | --model | --labels | --ranks | --events-port | --replay-port | --hash-algo | --vllm-version | \
            --seconds | --image)
            (($# > 1)) || die $EXIT_USAGE "$1 needs a value"
            local name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift
            ;;
        -*) die $EXIT_USAGE "unknown option $1; --help lists them" ;;
        *) positional+=("$1") ;;
        esac
        shift
    done
    if ((${#positional[@]} != 2)); then
        usage >&2
        exit $EXIT_USAGE
    fi
    namespace=${positional[0]} workload_name=${positional[1]}
    check_options
}

check_options() {
    is_one_of "$labels" aibrix none || die $EXIT_USAGE "--labels is $labels, expected aibrix or none"
    is_one_of "$hash_algo" '' sha256 sha256_cbor xxhash xxhash_cbor ||
        die $EXIT_USAGE "--hash-algo is $hash_algo, expected sha256, sha256_cbor, xxhash or xxhash_cbor"
    is_number "${ranks:-1}" 1 1024 || die $EXIT_USAGE "--ranks is $ranks, expected a number from 1 to 1024"
    is_number "$events_port" 1 65535 || die $EXIT_USAGE "--events-port is $events_port, expected a port"
    is_number "${replay_port:-1}" 1 65535 || die $EXIT_USAGE "--replay-port is $replay_port, expected a port"
    is_number "$seconds" 1 3600 || die $EXIT_USAGE "--seconds is $seconds, expected a number from 1 to 3600"
    [[ -z $vllm_version || $vllm_version =~ ^v?[0-9]+\.[0-9]+ ]] ||
        die $EXIT_USAGE "--vllm-version is $vllm_version, expected something like 0.32.0"
}

is_one_of() {
    local value=$1 one
    shift
    for one in "$@"; do
        [[ $value == "$one" ]] && return
    done
    return 1
}

is_number() { [[ $1 =~ ^[1-9][0-9]{0,4}$ ]] && (($1 >= $2 && $1 <= $3)); }

# --- the workload ----------------------------------------------------------------------------------------------------

# Sets `workload` (its JSON) and `resource` (kind/name).
read_workload() {
    local kind name=${workload_name##*/} found=()
    case $workload_name in
    */*)
        kind=$(tr '[:upper:]' '[:lower:]' <<<"${workload_name%%/*}")
        case ${kind%s} in
        deployment | deploy | deployment.apps) found=("deployment/$name") ;;
        statefulset | statefulset.apps | st) found=("statefulset/$name") ;;
        *) refuse "$workload_name is a $kind, expected a Deployment or a StatefulSet: what an operator makes" \
            "pods from (LeaderWorkerSet, StormService, RayCluster, InferenceService …) has to get the flag from its" \
            "own manifest" ;;
        esac
        ;;
    *)
        for kind in deployment statefulset; do
            kind=$(kube get "$kind" "$name" --ignore-not-found --output name)
            [[ -z $kind ]] || found+=("${kind/.apps/}")
        done
        ;;
    esac
    case ${#found[@]} in
    0) refuse "namespace $namespace has neither a Deployment nor a StatefulSet $name" ;;
    1) resource=${found[0]} ;;
    *) refuse "namespace $namespace has both a Deployment and a StatefulSet $name: say deployment/$name or" \
        "statefulset/$name" ;;
    esac
    workload=$(kube get "$resource" --output json)
}

# --- the command line ------------------------------------------------------------------------------------------------

# Definitions for all programs below. A flag's name is compared as vLLM's parser does: `_` is `-`.
# shellcheck disable=SC2016 # What begins with $ in it is jq's.
readonly JQ_DEFS='
def basename: sub(".*/"; "");
def argv: (.command // []) + (.args // []);
def image_name: (.image // "") | sub("@.*"; "") | basename | sub(":.*"; "");
def runs_vllm: (image_name | test("vllm")) or (argv | join(" ") | test("vllm[.]entrypoints|(^|[\\s/])vllm\\s+serve\\s"));
def containers: .spec.template.spec.containers;
def flags: . as $words | [range(length) as $i | $words[$i] | select(startswith("-"))
    | capture("^(?<name>[^=]*)(=(?<value>(.|\n)*))?$")
    | .name |= (if startswith("--") then gsub("_"; "-") else . end)
    | .value //= ($words[$i + 1] // "-" | if startswith("-") then null else . end)];
def read($change): . as $workload | $change
    | if .kind == "label" then $workload.spec.template.metadata.labels[.key]
      elif .kind == "annotation" then $workload.spec.template.metadata.annotations[.key]
      else .key as $key | .kind as $kind | $workload | containers[] | select(.name == $key) | .[$kind] end;
def shown: if . == null then "nothing" else tojson end;
'

# Sets `container`: the one that was named, else the only one that looks like vLLM.
find_container() {
    local found
    mapfile -t found < <(jq -r --arg name "$container" "$JQ_DEFS"'
        containers[] | select(if $name == "" then runs_vllm else .name == $name end) | .name' <<<"$workload")
    case ${#found[@]} in
    0) refuse "$resource has no container ${container:-that runs vLLM}; found" \
        "$(jq -r "$JQ_DEFS"'[containers[] | "\(.name) (\(.image))"] | join(", ")' <<<"$workload"), expected an image" \
        "or a command with vllm in its name, or --container" ;;
    1) container=${found[0]} ;;
    *) refuse "$resource has several containers that run vLLM: ${found[*]}; say --container NAME" ;;
    esac
}

# Splits `$1`, a shell's command line, into `words`, and sets `end`: where its last word ends. Only what means the same
# in every shell and at any time is understood; else `odd` says what is not.
split_words() {
    local text=$1 i char next quote='' word='' is_open=false is_over=false
    words=() end=0 odd=''
    for ((i = 0; i < ${#text}; i++)); do
        char=${text:i:1} next=${text:i+1:1}
        if [[ $char == \\ && $next == $'\n' && $quote != \' ]]; then
            i=$((i + 1))
            continue
        fi
        case $quote in
        \') if [[ $char == \' ]]; then quote=''; else word+=$char; fi ;;
        \")
            case $char in
            \") quote='' ;;
            [\$\`]) odd="a substitution ($char$next…)" ;;
            \\)
                if [[ $next == [\"\$\`\\] ]]; then char=$next i=$((i + 1)); fi
                word+=$char
                ;;
            *) word+=$char ;;
            esac
            ;;
        *)
            case $char in
            [$' \t\n'])
                if $is_open; then words+=("$word") word='' is_open=false; fi
                if [[ $char == $'\n' && ${#words[@]} -gt 0 ]]; then is_over=true; fi
                continue
                ;;
            \' | \") quote=$char ;;
            \\) word+=$next i=$((i + 1)) ;;
            [\$\`]) odd="a substitution ($char$next…)" ;;
            [\;\&\|\<\>\(\)]) odd="more than one plain command ($char)" ;;
            [\*\?\[\]\{\}\~\#\!]) odd="a $char outside quotes" ;;
            *) word+=$char ;;
            esac
            ;;
        esac
        if $is_over; then odd="more than one line"; fi
        if [[ -n $odd ]]; then return; fi
        is_open=true end=$((i + 1))
    done
    if [[ -n $quote ]]; then odd="a quote that is not closed"; fi
    if $is_open; then words+=("$word"); fi
}

# Sets `words` to vLLM's command line, and for a shell's text also `head` and `tail`, between which flags are added, and
# `spot`: the field and the index of that text.
read_command() {
    local text
    spot=$(jq -c --arg name "$container" "$JQ_DEFS"'containers[] | select(.name == $name)
        | (.command // [] | length) as $n | argv as $argv
        | if ($argv[0] // "" | basename | test("^(ba|da|a|k|z)?sh$") | not) then {kind: "list"}
          else ([range(1; $argv | length) | select($argv[.] | test("^-[a-z]*c$"))] | first) as $c
            | if $c == null or ($argv | length) != $c + 2 then {kind: "odd", found: $argv}
              elif $c + 1 < $n then {kind: "command", at: ($c + 1), text: $argv[$c + 1]}
              else {kind: "args", at: ($c + 1 - $n), text: $argv[$c + 1]} end
          end' <<<"$workload")
    head='' tail=''
    case $(jq -r .kind <<<"$spot") in
    list)
        mapfile -d '' -t words < <(jq -j --arg name "$container" "$JQ_DEFS"'containers[] | select(.name == $name)
            | argv[] + "\u0000"' <<<"$workload")
        ;;
    odd) refuse "container $container runs a shell in a way that is not understood: found" \
        "$(jq -c .found <<<"$spot"), expected [\"sh\", \"-c\", \"vllm serve …\"]" ;;
    *)
        # The dot keeps line ends that the substitution would cut off.
        text=$(jq -j '.text + "."' <<<"$spot") && text=${text%.}
        split_words "$text"
        [[ -z $odd ]] || refuse "container $container runs a shell script with $odd, expected one plain command" \
            "vllm serve …; add this to vLLM's arguments by hand: $(wanted_flag)"
        head=${text:0:end} tail=${text:end}
        ;;
    esac
}

wanted_config() {
    jq -nc --arg events "$events_port" --arg replay "${replay_port:-$((events_port + ${ranks:-1}))}" '{
        enable_kv_cache_events: true, publisher: "zmq", endpoint: "tcp://*:\($events)", replay_endpoint: "tcp://*:\($replay)"}'
}

wanted_flag() { printf -- "--kv-events-config '%s'" "$(wanted_config)"; }

# Sets `ranks` and `replay_port` where they were not given, which needs `words`.
settle_ports() {
    local found
    found=$(jq -nr "$JQ_DEFS"'$ARGS.positional | flags | map(select(.name == "--data-parallel-size" or .name == "-dp"))
        | last.value // "1"' --args -- "${words[@]}")
    is_number "$found" 1 1024 || refuse "--data-parallel-size is $found, expected a number"
    if [[ ${ranks:-$found} != "$found" ]]; then
        refuse "--ranks is $ranks, but vLLM is started with --data-parallel-size $found"
    fi
    ranks=$found
    replay_port=${replay_port:-$((events_port + ranks))}
    if ((replay_port < events_port + ranks && events_port < replay_port + ranks)); then
        refuse "the ports of $ranks ranks overlap: events from $events_port, replay from $replay_port on"
    fi
    ((events_port + ranks <= 65536 && replay_port + ranks <= 65536)) || refuse "the ports of $ranks ranks end above 65535"
}

# --- the plan --------------------------------------------------------------------------------------------------------

# Makes {refusals, notes, changes} of the workload; a change is {kind, key, before, after}.
# shellcheck disable=SC2016 # What begins with $ in it is jq's.
readonly JQ_PLAN='
def version($tag): $tag | capture("^v?(?<major>[0-9]+)[.](?<minor>[0-9]+)") | [.major, .minor] | map(tonumber);
def value($flags; $names): [$flags[] | select(.name as $name | any($names[]; . == $name))] | last | .value;
def has($flags; $name): any($flags[]; .name == $name);
def is_label: test("^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$");
# Of a default the annotation may be missing, but not say something else: the router would believe it.
def annotation($key; $value; $default): .spec.template.metadata.annotations[$key] as $found
    | [{kind: "annotation", key: $key, after: (if $value == $default and $found != $value then null else $value end)}];
def quoted: if test("^[A-Za-z0-9_./:=,-]+$") then . else @sh end;

. as $workload
| (containers[] | select(.name == $container)) as $c
| (.spec.template.metadata.labels // {}) as $old_labels
| ($words | flags) as $flags
| ([range($words | length) | select(($words[.] | basename) == "vllm" and $words[. + 1] == "serve")] | first) as $serve
| ([range($words | length) | select($words[.] == "-m" and ($words[. + 1] // "" | test("^vllm[.]entrypoints[.]")))] | first) as $api
| (($c.command == null) and $spot.kind == "list") as $is_entrypoint
| (if $serve != null then $words[$serve + 2]
   elif $is_entrypoint then (if $words[0] == "serve" then $words[1] else $words[0] end)
   else null end) as $positional
| (value($flags; ["--served-model-name"]) // value($flags; ["--model"])
    // ($positional | if . == null or startswith("-") then null else . end)) as $served
| ($old_labels[$name_label] // (if $model != "" then $model else $served end)) as $name
| (if $version != "" then $version else ($c.image // "" | sub("@.*"; "") | basename
    | if contains(":") then sub(".*:"; "") else "" end) end) as $tag
| ([version($tag)?] | first) as $vllm
| [$c.env[]? | {key: .name, value: (.value // "")}] as $env
| ([$flags[] | select(.name | startswith("--kv-ev"))]) as $given
| (($given | last | .value // "" | fromjson?) // null) as $config
| ($config | type == "object" and .enable_kv_cache_events == true and (.publisher // "zmq") == "zmq"
    and (.endpoint // "tcp://*:5557") == $wanted.endpoint and .replay_endpoint == $wanted.replay_endpoint) as $is_set
| value($flags; ["--prefix-caching-hash-algo"]) as $algo
| (value($flags; ["--port"]) // "8000") as $port
| ((if $given == [] then ["--kv-events-config", ($wanted | tojson)] else [] end)
    + (if $hash_algo != "" and $algo == null then ["--prefix-caching-hash-algo", $hash_algo] else [] end)) as $new_flags
| (if $new_flags == [] then []
   elif $spot.kind == "list" then [{kind: "args", key: $container, before: $c.args, after: (($c.args // []) + $new_flags)}]
   else [{kind: $spot.kind, key: $container, before: $c[$spot.kind],
       after: ($c[$spot.kind] | .[$spot.at] = ([$head] + ($new_flags | map(quoted)) | join(" ")) + $tail)}] end) as $command
| (if $labels == "none" then [] else
    [{kind: "label", key: $name_label, after: $name}, {kind: "label", key: $events_label, after: "true"}] end
    + (if $port != "8000" and $old_labels[$port_label] == null
       then [{kind: "annotation", key: "warmroute.io/port", after: $port}] else [] end)
    + annotation("warmroute.io/events-port"; $events_port; "5557")
    + annotation("warmroute.io/replay-port"; $replay_port; "5558")
    + annotation("warmroute.io/ranks"; $ranks; "1")
    | map(. as $change | {kind, key, before: ($workload | read($change)), after}) | map(select(.before != .after))) as $marks
| {
    refusals: [
        (.metadata.ownerReferences[]? | select(.controller) | "\(.kind) \(.name) owns it and would take the change back: change that one"),
        (if $serve == null and $api == null and ($is_entrypoint | not)
         then "container \($container) does not start vLLM in a way that is understood: found \($words | tojson), expected vllm serve … or python3 -m vllm.entrypoints.openai.api_server …" else empty end),
        (if $vllm != null and $vllm < [0, 9]
         then "vLLM \($tag) has no KV events, expected 0.9 or newer (--vllm-version, if the tag of \($c.image) is none of vLLM)" else empty end),
        ($env[] | select(.key == "VLLM_USE_V1" and .value == "0") | "VLLM_USE_V1=0 chooses an engine that has no KV events"),
        (if any($flags[]; .name | startswith("--no-enable-pref")) then "--no-enable-prefix-caching is set: there would be no events" else empty end),
        (if any($given[]; .name | contains(".")) then "found \($given | map(.name) | join(" ")), expected one --kv-events-config with JSON"
         elif $given != [] and ($is_set | not) then "found --kv-events-config \($given | last | .value | shown), expected \($wanted | tojson): remove it, or give its ports to this script" else empty end),
        (if $hash_algo != "" and ($algo // $hash_algo) != $hash_algo then "--hash-algo is \($hash_algo), but vLLM is started with --prefix-caching-hash-algo \($algo)" else empty end),
        ($flags[] | select(.name | test("^--(data-parallel-(rank|start-rank|size-local|hybrid-lb|external-lb|multi-port-external-lb)|headless)$"))
         | "\(.name): the ranks are spread over pods, which then publish on different ports"),
        (if $labels == "none" then empty
         elif $name == null then "the model has no name on vLLM\u2019s command line: say --model NAME"
         elif $model != "" and $model != $name then "--model is \($model), but the pods have the label \($name_label)=\($name)"
         elif ($name | is_label | not) then "\($name | tojson) cannot be the value of a label: say --model NAME, where NAME is models[].name in the router\u2019s configuration and this an alias there, or --labels none"
         else empty end),
        ($marks[] | select(.kind == "label") | .key as $key | .before as $before | select($workload.spec.selector.matchLabels[$key]? != null)
         | "the label \($key) is part of the selector, as \($before | tojson)")
    ],
    notes: [
        (if $vllm == null then "the version of vLLM cannot be told from the tag \($tag | tojson): it has to be 0.9 or newer" else empty end),
        (if $vllm != null and $vllm < [0, 29] and ($algo // "" | startswith("xxhash") | not) and all($env[]; .key != "PYTHONHASHSEED")
         then "vLLM before 0.29 starts its hashes at random unless PYTHONHASHSEED is set; without it the router follows token ids, which takes more memory" else empty end),
        (if has($flags; "--config") then "--config is set: its file must not switch prefix caching off" else empty end),
        (if .metadata.labels["app.kubernetes.io/managed-by"] == "Helm" then "Helm manages this object: put the flag into the values of its chart too, else its next upgrade removes it" else empty end),
        (if .spec.updateStrategy.type? == "OnDelete" then "updateStrategy is OnDelete: the pods change when they are deleted" else empty end)
    ],
    changes: ($command + $marks)
}'

make_plan() {
    plan=$(jq -c --arg container "$container" --argjson words "$(jq -nc '$ARGS.positional' --args -- "${words[@]}")" \
        --argjson spot "$spot" --arg head "$head" --arg tail "$tail" --argjson wanted "$(wanted_config)" \
        --arg labels "$labels" --arg model "$model" --arg version "$vllm_version" --arg hash_algo "$hash_algo" \
        --arg events_port "$events_port" --arg replay_port "$replay_port" --arg ranks "$ranks" \
        --arg name_label "$NAME_LABEL" --arg events_label "$EVENTS_LABEL" --arg port_label "$PORT_LABEL" \
        "$JQ_DEFS$JQ_PLAN" <<<"$workload")
    refuse_all "$(jq -r '.refusals[]' <<<"$plan")"
}

refuse_all() {
    [[ -n $1 ]] || return 0
    while IFS= read -r reason; do
        warn "enable-kv-events: refused: $reason"
    done <<<"$1"
    exit $EXIT_REFUSED
}

# --- the patch -------------------------------------------------------------------------------------------------------

# Makes a strategic merge patch of changes ({kind, key, after}) and of the text for the annotation, or null. The resource
# version makes the API server refuse it when somebody else was faster.
make_patch() {
    jq -c --argjson undo "$2" --arg undo_key "$UNDO" --argjson changes "$1" '
        def pairs($kind): [$changes[] | select(.kind == $kind) | {key, value: .after}] | from_entries;
        def fields: [$changes[] | select(.kind == "args" or .kind == "command")]
            | group_by(.key) | map({name: .[0].key} + (map({key: .kind, value: .after}) | from_entries));
        {metadata: {resourceVersion: .metadata.resourceVersion, annotations: {($undo_key): $undo}},
         spec: {template: {
            metadata: {labels: pairs("label"), annotations: pairs("annotation")},
            spec: (if fields == [] then {} else {containers: fields} end)}}}' <<<"$workload"
}

# Sends the patch, or shows what it would change. Fails when somebody else was faster.
send_patch() {
    local patch=$1 said
    if $is_dry; then
        show_patch "$patch"
        return
    fi
    if said=$(kube patch "$resource" --type strategic --patch "$patch" 2>&1); then
        say "$said"
        say "the pods are replaced now: kubectl --namespace $namespace rollout status $resource"
    elif [[ $said == *"the object has been modified"* ]]; then
        return 1
    else
        die $EXIT_KUBECTL "$said"
    fi
}

# Prints what the patch would change, as the API server has it. What is not written cannot overwrite what others have
# changed meanwhile, so the resource version is left out.
show_patch() {
    local patch before after
    patch=$(jq -c 'del(.metadata.resourceVersion)' <<<"$1") || die $EXIT_KUBECTL "the patch of $resource is not JSON"
    before=$(kube get "$resource" --output yaml | without_counters) || die $EXIT_KUBECTL "$resource cannot be read"
    after=$(kube patch "$resource" --type strategic --patch "$patch" --dry-run=server --output yaml | without_counters) ||
        die $EXIT_KUBECTL "the API server does not take the patch of $resource"
    diff --unified --label "$resource" --label "$resource, changed" <(say "$before") <(say "$after") || (($? == 1)) ||
        die $EXIT_KUBECTL "diff failed"
}

# Without the numbers that the API server counts up with every write.
without_counters() { sed -E '/^  (resourceVersion|generation): /d'; }

plan_enable() {
    find_container
    read_command
    settle_ports
    make_plan
    jq -r '.notes[] | "note: \(.)"' <<<"$plan" >&2
    changes=$(jq -c .changes <<<"$plan")
    # What was changed before and is still as it was left keeps its original.
    undo=$(jq -c --arg key "$UNDO" --argjson changes "$changes" "$JQ_DEFS"'. as $workload
        | (.metadata.annotations[$key] // "[]" | fromjson | map(. as $old | select(($workload | read($old)) == .after))) as $old
        | ($changes | map(. as $new | ([$old[] | select(.kind == $new.kind and .key == $new.key)] | first) as $earlier
            | if $earlier == null then . else .before = $earlier.before end)) as $new
        | [$old[] | . as $one | select(all($new[]; .kind != $one.kind or .key != $one.key))] + $new | tojson' <<<"$workload")
    nothing="$resource publishes KV events already: nothing to do"
}

plan_rollback() {
    local record
    record=$(jq -c --arg key "$UNDO" '.metadata.annotations[$key] // "[]" | fromjson' <<<"$workload")
    nothing="$resource has no annotation $UNDO: nothing to roll back"
    refuse_all "$(jq -r --argjson record "$record" "$JQ_DEFS"'. as $workload | $record[] | . as $change
        | ([$workload | read($change)] | first) as $found | select($found != .after and $found != .before)
        | "\(.kind) \(.key) was changed since: found \($found | shown), expected \(.after | shown); what was there before this script: \(.before | shown)"' <<<"$workload")"
    changes=$(jq -c 'map(.after = .before)' <<<"$record")
    undo=null
}

run_change() {
    local attempt
    for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
        read_workload
        "plan_$action"
        if [[ $changes == '[]' ]]; then
            say "$nothing"
            return
        fi
        if send_patch "$(make_patch "$changes" "$undo")"; then
            return
        fi
    done
    die $EXIT_KUBECTL "$resource was changed by others $ATTEMPTS times in a row"
}

# --- verify ----------------------------------------------------------------------------------------------------------

# Sets `pod` to a pod of the workload that is ready and labelled as the router wants it.
find_pod() {
    local selector pods
    selector=$(jq -r '[.spec.selector.matchLabels // {} | to_entries[] | "\(.key)=\(.value)"] | join(",")' <<<"$workload")
    [[ $labels == none ]] || selector+=,$EVENTS_LABEL=true
    pods=$(kube get pods --selector "$selector" --output json)
    pod=$(jq -c '[.items[] | select(.metadata.deletionTimestamp == null and .status.podIP != null)
        | select(any(.status.conditions[]?; .type == "Ready" and .status == "True"))] | first' <<<"$pods")
    [[ $pod != null ]] || die $EXIT_SILENT "no pod with $selector is ready; found $(jq -r \
        '[.items[] | "\(.metadata.name) (\(.status.phase))"] | if . == [] then "none" else join(", ") end' <<<"$pods")"
}

# Prints what the rank publishes and judges it. `$@` follows its events and replay endpoints.
judge() {
    local rank=$1 shown=$scratch/tail
    shift
    timeout --signal INT --kill-after 5 "$seconds" "$@" 2>&1 | tee "$shown" || true
    if ! grep -q '^-- connected' "$shown"; then
        warn "rank $rank: nobody publishes there: vLLM runs without --kv-events-config, or a NetworkPolicy is in the way"
        return 1
    elif ! grep -qvE '^(--|$)' "$shown"; then
        warn "rank $rank: connected, but nothing was published yet: send the model a prompt of a few hundred words"
        return 1
    fi
    say "rank $rank: $(grep -cvE '^(--|$)' "$shown") events"
}

# Follows a rank through a port-forward.
verify_from_here() {
    local rank=$1 log=$scratch/forward local_ports
    kube port-forward "pod/$(jq -r .metadata.name <<<"$pod")" --address 127.0.0.1 \
        ":$((events_port + rank))" ":$((replay_port + rank))" >"$log" 2>&1 &
    forward=$!
    for ((i = 0; i < 100; i++)); do
        mapfile -t local_ports < <(sed -nE 's/^Forwarding from 127\.0\.0\.1:([0-9]+) .*/\1/p' "$log")
        ((${#local_ports[@]} < 2)) || break
        kill -0 "$forward" 2>/dev/null || break
        sleep 0.1
    done
    ((${#local_ports[@]} == 2)) || die $EXIT_KUBECTL "kubectl port-forward said: $(cat "$log")"
    judge "$rank" "${WARMROUTE_BIN:-warmroute}" events tail "tcp://127.0.0.1:${local_ports[0]}" \
        --replay "tcp://127.0.0.1:${local_ports[1]}" || return_code=$EXIT_SILENT
    kill "$forward" 2>/dev/null || true
    forward=''
}

# Follows a rank from a pod of its own, which a NetworkPolicy for the routers alone does not let through.
verify_from_pod() {
    local rank=$1 ip
    ip=$(jq -r '.status.podIP | if contains(":") then "[\(.)]" else . end' <<<"$pod")
    visitor=$(jq -nc --arg image "$image" --arg events "tcp://$ip:$((events_port + rank))" \
        --arg replay "tcp://$ip:$((replay_port + rank))" --argjson seconds "$seconds" '{
        apiVersion: "v1", kind: "Pod",
        metadata: {generateName: "warmroute-verify-", labels: {"app.kubernetes.io/name": "warmroute-verify"}},
        spec: {restartPolicy: "Never", activeDeadlineSeconds: ($seconds + 300), automountServiceAccountToken: false,
            securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: "RuntimeDefault"}},
            containers: [{name: "tail", image: $image, args: ["events", "tail", $events, "--replay", $replay],
                securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: ["ALL"]}}}]}}' |
        kube create --filename - --output name)
    kube wait "$visitor" --for jsonpath='{.status.phase}'=Running --timeout 120s
    judge "$rank" "${KUBECTL:-kubectl}" --namespace "$namespace" logs --follow "$visitor" || return_code=$EXIT_SILENT
    kube delete "$visitor" --wait=false >/dev/null
    visitor=''
}

clean_up() {
    [[ -z ${forward:-} ]] || kill "$forward" 2>/dev/null || true
    [[ -z ${visitor:-} ]] || kube delete "$visitor" --wait=false >/dev/null 2>&1 || true
    [[ -z ${scratch:-} ]] || rm -rf "$scratch"
}

run_verify() {
    local rank return_code=0
    if [[ -z $image ]] && ! command -v "${WARMROUTE_BIN:-warmroute}" >/dev/null; then
        die $EXIT_USAGE "--verify needs the program warmroute on PATH or in WARMROUTE_BIN, or --image"
    fi
    read_workload
    find_container
    read_command
    settle_ports
    find_pod
    scratch=$(mktemp -d)
    trap clean_up EXIT
    say "pod $(jq -r .metadata.name <<<"$pod"), $ranks rank(s), ${seconds}s each"
    for ((rank = 0; rank < ranks; rank++)); do
        if [[ -n $image ]]; then verify_from_pod "$rank"; else verify_from_here "$rank"; fi
    done
    exit "$return_code"
}

# The check itself is understood by any version.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    die $EXIT_USAGE "bash is $BASH_VERSION, expected 4.4 or newer"
fi
read_options "$@"
programs=(jq "${KUBECTL:-kubectl}")
if $is_dry; then programs+=(diff); fi
for program in "${programs[@]}"; do
    command -v "$program" >/dev/null || die $EXIT_USAGE "$program is not installed"
done
case $action in
verify) run_verify ;;
*) run_change ;;
esac
