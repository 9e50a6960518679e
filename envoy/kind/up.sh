#!/usr/bin/env bash
# A kind cluster with Envoy Gateway, two CPU vLLM servers and warmroute in front of them, and one warm answer to show for it.
#
#   envoy/kind/up.sh          make it, or bring what is there up to date
#   envoy/kind/up.sh down     delete it
#
# Needs docker, kind, helm, kubectl and curl; 16 GB of memory, and for the first start half an hour, most of it vLLM's image and the image of
# warmroute, which is built here. CLUSTER names the cluster (warmroute).
#
# Not run by our tests, which have no container engine: there the manifests are checked by a real API server.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly CLUSTER=${CLUSTER:-warmroute} NAMESPACE=llm
readonly ENVOY_GATEWAY_VERSION=v1.9.1
# Not "latest", for which a node would ask a registry.
readonly IMAGE=warmroute TAG=kind

kube() { kubectl --context "kind-$CLUSTER" "$@"; }

need() {
    local program
    for program in "$@"; do
        if ! command -v "$program" >/dev/null; then
            echo "$program is not installed" >&2
            exit 2
        fi
    done
}

make_cluster() {
    if ! kind get clusters | grep -qx "$CLUSTER"; then
        kind create cluster --name "$CLUSTER" --config envoy/kind/cluster.yaml
    fi
    docker build --tag "$IMAGE:$TAG" .
    kind load docker-image --name "$CLUSTER" "$IMAGE:$TAG"
}

install_envoy_gateway() {
    helm upgrade --install eg oci://docker.io/envoyproxy/gateway-helm --version "$ENVOY_GATEWAY_VERSION" \
        --kube-context "kind-$CLUSTER" --namespace envoy-gateway-system --create-namespace --wait
    kube apply --filename envoy/kind/gateway.yaml
}

install_engines() {
    kube create namespace "$NAMESPACE" --dry-run=client --output yaml | kube apply --filename -
    kube apply --namespace "$NAMESPACE" --kustomize envoy/kind/vllm
}

# The image's id is in the pods' annotations: its tag is the same whatever was built, and would not replace them.
install_warmroute() {
    local id
    id=$(docker image inspect --format '{{.Id}}' "$IMAGE:$TAG")
    helm upgrade --install warmroute charts/warmroute --kube-context "kind-$CLUSTER" --namespace "$NAMESPACE" \
        --values envoy/vllm/values.yaml --set image.repository="$IMAGE" --set image.tag="$TAG" \
        --set-string podAnnotations.image-id="$id" --wait
}

# Asks the same long question twice; the second answer says how much of it was cached.
show() {
    local port=18080 prompt body answer forward
    kube wait --namespace "$NAMESPACE" deployment/vllm-quick-start --for condition=Available --timeout 40m
    kube wait gateway/eg --for condition=Programmed --timeout 5m
    kube port-forward --namespace envoy-gateway-system \
        "service/$(kube get service --namespace envoy-gateway-system --output jsonpath='{.items[0].metadata.name}' \
            --selector gateway.envoyproxy.io/owning-gateway-name=eg)" "$port:80" >/dev/null &
    forward=$!
    # shellcheck disable=SC2064 # The process of now is meant.
    trap "kill $forward" EXIT
    prompt=$(printf 'The quick brown fox jumps over the lazy dog. %.0s' {1..40})
    body="{\"model\": \"qwen3-0.6b\", \"max_tokens\": 8, \"prompt\": \"$prompt\"}"
    for _ in 1 2; do
        answer=$(curl --silent --show-error --fail --retry 30 --retry-delay 2 --retry-connrefused \
            --header 'content-type: application/json' --data "$body" "http://127.0.0.1:$port/v1/completions")
        grep -o '"usage":.*' <<<"$answer"
    done
}

case ${1:-up} in
up)
    need docker kind helm kubectl curl
    make_cluster
    install_envoy_gateway
    install_engines
    install_warmroute
    show
    ;;
down)
    need kind
    kind delete cluster --name "$CLUSTER"
    ;;
*)
    echo "usage: $0 [up|down]" >&2
    exit 2
    ;;
esac
