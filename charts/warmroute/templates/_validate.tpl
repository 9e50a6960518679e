{{/* Values that are right one by one and wrong together. Each message names the value, what was found and what was expected. */}}

{{- define "warmroute.validate" -}}
{{- include "warmroute.validateModels" . -}}
{{- include "warmroute.validateEnvoy" . -}}
{{- include "warmroute.validateNetworkPolicy" . -}}
{{- $limit := ((.Values.resources).limits).memory -}}
{{- if $limit -}}
{{- $needed := add (int64 .Values.config.limits.index_bytes) 536870912 -}}
{{- if lt (include "warmroute.bytes" $limit | int64) $needed -}}
{{- $found := ternary $limit (int64 $limit) (kindIs "string" $limit) -}}
{{- fail (printf "resources.limits.memory: found %v, expected at least %d bytes, 512 MiB more than config.limits.index_bytes" $found $needed) -}}
{{- end -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas: found %d, expected at most autoscaling.maxReplicas, %d" (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "warmroute.validateModels" -}}
{{- if not .Values.config.models -}}
{{- fail "config.models: found nothing, expected at least one model, such as [{name: qwen, discovery: {kubernetes: {preset: aibrix}}}]" -}}
{{- end -}}
{{- $timeout := include "warmroute.milliseconds" .Values.config.envoy.message_timeout | int64 -}}
{{- range $i, $model := .Values.config.models -}}
{{- $kinds := list -}}
{{- range $kind, $value := $model.discovery -}}
{{- if not (kindIs "invalid" $value) -}}{{- $kinds = append $kinds $kind -}}{{- end -}}
{{- end -}}
{{- if ne (len $kinds) 1 -}}
{{- fail (printf "config.models[%d].discovery: found %s, expected exactly one of static, kubernetes, dns, file" $i (join " and " $kinds | default "nothing")) -}}
{{- end -}}
{{- with $model.discovery.kubernetes -}}
{{- $given := list -}}
{{- range $name := list "selector" "service" "inference_pool" -}}
{{- if get $model.discovery.kubernetes $name -}}{{- $given = append $given $name -}}{{- end -}}
{{- end -}}
{{- if gt (len $given) 1 -}}
{{- fail (printf "config.models[%d].discovery.kubernetes: found %s, expected at most one of selector, service and inference_pool" $i (join " and " $given)) -}}
{{- end -}}
{{- if and (eq (default "" .preset) "none") (not $given) -}}
{{- fail (printf "config.models[%d].discovery.kubernetes.preset: found none, expected a selector, a service or an inference_pool beside it" $i) -}}
{{- end -}}
{{- if not (or $given (and (le (len $model.name) 63) (regexMatch "^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$" $model.name))) -}}
{{- fail (printf "config.models[%d].name: found %s, which no label can be, expected a selector, a service or an inference_pool in discovery.kubernetes" $i $model.name) -}}
{{- end -}}
{{- end -}}
{{- range $kind := list "kubernetes" "dns" -}}
{{- with get $model.discovery $kind -}}
{{- $place := printf "config.models[%d].discovery.%s" $i $kind -}}
{{- include "warmroute.validatePorts" (list $place "events_port" (default 5557 .events_port) "replay_port" (default 5558 .replay_port) .ranks) -}}
{{- end -}}
{{- end -}}
{{- range $j, $endpoint := $model.discovery.static -}}
{{- $events := default "" .events -}}
{{- $replay := default "" .replay -}}
{{- if and (hasPrefix "tcp://" $events) (hasPrefix "tcp://" $replay) (eq (include "warmroute.hostOf" $events) (include "warmroute.hostOf" $replay)) -}}
{{- $place := printf "config.models[%d].discovery.static[%d]" $i $j -}}
{{- include "warmroute.validatePorts" (list $place "events" (regexFind "[0-9]+$" $events) "replay" (regexFind "[0-9]+$" $replay) .ranks) -}}
{{- end -}}
{{- end -}}
{{- range $name := list "budget" "budget_max" -}}
{{- $budget := get ($model.tokenizer | default dict) $name -}}
{{- if $budget -}}
{{- if gt (mul (include "warmroute.milliseconds" $budget | int64) 10) (mul $timeout 9) -}}
{{- fail (printf "config.models[%d].tokenizer.%s: found %s, expected at most nine tenths of config.envoy.message_timeout, %s" $i $name $budget $.Values.config.envoy.message_timeout) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* That no rank's events are on the port of another's replay: it takes the place, name and first port of each, and the ranks. */}}
{{- define "warmroute.validatePorts" -}}
{{- $place := index . 0 -}}
{{- $events := index . 2 | int -}}
{{- $replay := index . 4 | int -}}
{{- $ranks := index . 5 | default 1 | int -}}
{{- if and (lt $replay (add $events $ranks | int)) (lt $events (add $replay $ranks | int)) -}}
{{- $text := "%s.%s: found port %d, expected one at least %d away from that of %s, %d, since rank r is r further with each" -}}
{{- fail (printf $text $place (index . 3) $replay $ranks (index . 1) $events) -}}
{{- end -}}
{{- end -}}

{{- define "warmroute.validateEnvoy" -}}
{{- $selection := .Values.config.selection -}}
{{- $header := include "warmroute.selectionHeader" . -}}
{{- if and (eq $selection.mode "override_host") (not (hasPrefix "x-" $header)) -}}
{{- fail (printf "config.selection.header: found %s, expected a name that begins with x-, since config.selection.mode is override_host" $header) -}}
{{- end -}}
{{- if eq $selection.mode "original_dst" -}}
{{- $found := list .Values.config.rollout.mode -}}
{{- range .Values.config.models -}}{{- with .rollout -}}
{{- $found = append $found .mode -}}
{{- if and (not (kindIs "invalid" .percent)) (ne 100 (int .percent)) -}}{{- $found = append $found (printf "%d percent" (int .percent)) -}}{{- end -}}
{{- end -}}{{- end -}}
{{- range without $found "active" nil -}}
{{- fail (printf "config.rollout: found %v, expected active for all requests, since Envoy cannot pick by itself with config.selection.mode: original_dst" .) -}}
{{- end -}}
{{- end -}}
{{- with .Values.envoyGateway -}}
{{- if and .gateway.name (not .routes) -}}
{{- fail (printf "envoyGateway.routes: found nothing, expected at least one route, since envoyGateway.gateway.name is %s" .gateway.name) -}}
{{- end -}}
{{- if and .routes (not .gateway.name) -}}
{{- fail "envoyGateway.gateway.name: found nothing, expected the Gateway that envoyGateway.routes attach to" -}}
{{- end -}}
{{- $names := list -}}
{{- range .routes -}}{{- $names = append $names .name -}}{{- end -}}
{{- if ne (len $names) (len (uniq $names)) -}}
{{- fail (printf "envoyGateway.routes: found the names %s, expected each name once" (join ", " $names)) -}}
{{- end -}}
{{- if and .gateway.name .failOpen (eq $selection.body_mode "full_duplex_streamed") -}}
{{- fail "envoyGateway.failOpen: found true, expected false, since config.selection.body_mode is full_duplex_streamed and Envoy Gateway refuses both together" -}}
{{- end -}}
{{- end -}}
{{- if .Values.envoySidecar.enabled -}}
{{- if semverCompare "<1.30-0" .Capabilities.KubeVersion.Version -}}
{{- fail (printf "envoySidecar.enabled: found Kubernetes %s, expected 1.30 or newer, whose sleep hook Envoy needs to finish its answers" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if not .Values.envoySidecar.engines.host -}}
{{- fail "envoySidecar.engines.host: found nothing, expected the name of a headless Service over the engines' pods" -}}
{{- end -}}
{{- if gt (len .Values.config.models) 1 -}}
{{- fail (printf "config.models: found %d models, expected one with envoySidecar.enabled: a release for each model, or a gateway" (len .Values.config.models)) -}}
{{- end -}}
{{- end -}}
{{- if .Values.inferencePool.create -}}
{{- if not .Values.inferencePool.matchLabels -}}
{{- fail "inferencePool.matchLabels: found nothing, expected the labels of the engines' pods" -}}
{{- end -}}
{{- $pool := default (include "warmroute.fullname" .) .Values.inferencePool.name -}}
{{- $pools := list -}}
{{- range .Values.config.models -}}
{{- with .discovery.kubernetes -}}
{{- if eq (default $.Release.Namespace .namespace) $.Release.Namespace -}}{{- $pools = append $pools (default "" .inference_pool) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (has $pool $pools) -}}
{{- fail (printf "inferencePool.name: found %s, expected the discovery.kubernetes.inference_pool of one of config.models in namespace %s" $pool .Release.Namespace) -}}
{{- end -}}
{{- if ne $header "x-gateway-destination-endpoint" -}}
{{- fail (printf "config.selection: found the header %s, expected x-gateway-destination-endpoint, which the gateways of an InferencePool read" $header) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "warmroute.validateNetworkPolicy" -}}
{{- with .Values.networkPolicy -}}
{{- if and .engines.enabled (eq (include "warmroute.watches" $) "{}") -}}
{{- fail "networkPolicy.engines.enabled: found true, expected a model with discovery.kubernetes, since only pods can be closed" -}}
{{- end -}}
{{- if and .engines.enabled (not .enginePodLabels) -}}
{{- fail "networkPolicy.enginePodLabels: found nothing, expected the labels of the engines' pods, since networkPolicy.engines.enabled would else close ports of every pod" -}}
{{- end -}}
{{- if and .enabled (not .extraEgress) -}}
{{- range $i, $model := $.Values.config.models -}}
{{- if or $model.discovery.file (eq (default "a" ($model.discovery.dns).kind) "srv") -}}
{{- fail (printf "networkPolicy.extraEgress: found nothing, expected rules for the engines of config.models[%d], whose addresses or ports are not known here (or networkPolicy.enabled: false)" $i) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
