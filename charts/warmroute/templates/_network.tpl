{{/* The labels by which a preset finds the pods of a model, as JSON: it takes the discovery and the model's name. */}}
{{- define "warmroute.presetLabels" -}}
{{- $kubernetes := index . 0 -}}
{{- $labels := dict -}}
{{- if not (or $kubernetes.selector $kubernetes.service $kubernetes.inference_pool) -}}
{{- $preset := default "aibrix" $kubernetes.preset -}}
{{- if eq $preset "aibrix" -}}{{- $_ := set $labels "model.aibrix.ai/name" (index . 1) -}}{{- end -}}
{{- if eq $preset "llm-d" -}}{{- $_ := set $labels "llm-d.ai/model" (index . 1) -}}{{- end -}}
{{- end -}}
{{- $labels | toJson -}}
{{- end -}}

{{/* Egress rules to the engines: to their pods where those are pods, to their addresses where these are known. Where a Service or an
InferencePool says which port it is, all ports of those pods are open. */}}
{{- define "warmroute.engineEgress" -}}
{{- $policy := .Values.networkPolicy -}}
{{- $rules := list -}}
{{- $extra := list -}}
{{- range $policy.extraEnginePorts -}}{{- $extra = append $extra (dict "protocol" "TCP" "port" (int .)) -}}{{- end -}}
{{- range .Values.config.models -}}
{{- $discovery := .discovery -}}
{{- $name := .name -}}
{{- with $discovery.kubernetes -}}
{{- $namespaces := dict "matchLabels" (dict "kubernetes.io/metadata.name" (default $.Release.Namespace .namespace)) -}}
{{- $labels := $policy.enginePodLabels | default (include "warmroute.presetLabels" (list . $name) | fromJson) -}}
{{- $peer := dict "namespaceSelector" $namespaces "podSelector" (dict "matchLabels" $labels) -}}
{{- $rule := dict "to" (list $peer) -}}
{{- if or .port (not (or .service .inference_pool)) -}}
{{- $http := dict "protocol" "TCP" "port" (default 8000 .port | int) -}}
{{- $_ := set $rule "ports" (concat (list $http) (include "warmroute.eventPorts" . | fromJsonArray) $extra | uniq) -}}
{{- end -}}
{{- $rules = append $rules $rule -}}
{{- end -}}
{{- with $discovery.dns -}}
{{- $ports := concat (include "warmroute.eventPorts" . | fromJsonArray) $extra -}}
{{- if ne (default "a" .kind) "srv" -}}
{{- $ports = prepend $ports (dict "protocol" "TCP" "port" (default 8000 .port | int)) -}}
{{- end -}}
{{- $rules = append $rules (dict "ports" (uniq $ports)) -}}
{{- end -}}
{{- range $discovery.static -}}
{{- $ports := list (dict "protocol" "TCP" "port" (regexFind "[0-9]+$" .address | int)) -}}
{{- $ranks := default 1 .ranks -}}
{{- range list .events .replay -}}
{{- if and . (hasPrefix "tcp://" .) (not (hasPrefix "tcp://*" .)) -}}
{{- $ports = concat $ports (include "warmroute.rankPorts" (list (regexFind "[0-9]+$" . | int) $ranks) | fromJsonArray) -}}
{{- end -}}
{{- end -}}
{{- $ip := regexReplaceAll ":[0-9]+$" .address "" | trimAll "[]" -}}
{{- $cidr := printf "%s/%d" $ip (ternary 128 32 (contains ":" $ip)) -}}
{{- $rules = append $rules (dict "to" (list (dict "ipBlock" (dict "cidr" $cidr))) "ports" (uniq (concat $ports $extra))) -}}
{{- end -}}
{{- with (.tokenizer).endpoint -}}
{{- $rules = append $rules (dict "ports" (list (dict "protocol" "TCP" "port" (include "warmroute.portOf" . | int)))) -}}
{{- end -}}
{{- end -}}
{{- with uniq $rules -}}{{- toYaml . -}}{{- end -}}
{{- end -}}

{{/* All TCP ports but those of the NetworkPolicy ports that it takes. */}}
{{- define "warmroute.otherPorts" -}}
{{- $starts := list -}}
{{- $ends := dict -}}
{{- range . -}}
{{- $start := printf "%05d" (int .port) -}}
{{- $starts = append $starts $start -}}
{{- $_ := set $ends $start (max (int .port) (default 0 .endPort | int) (get $ends $start | default 0 | int)) -}}
{{- end -}}
{{- $others := list -}}
{{- $next := 1 -}}
{{- range $starts | uniq | sortAlpha -}}
{{- $start := regexFind "[1-9][0-9]*$" . | int -}}
{{- if gt $start $next -}}
{{- $others = append $others (dict "protocol" "TCP" "port" $next "endPort" (sub $start 1)) -}}
{{- end -}}
{{- $next = max $next (add 1 (get $ends .)) -}}
{{- end -}}
{{- if le (int $next) 65535 -}}
{{- $others = append $others (dict "protocol" "TCP" "port" $next "endPort" 65535) -}}
{{- end -}}
{{- toYaml $others -}}
{{- end -}}
