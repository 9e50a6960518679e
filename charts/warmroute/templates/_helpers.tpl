{{/* Names and labels. The selectors are made of the two labels that no upgrade changes. */}}

{{- define "warmroute.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 48 | trimSuffix "-" -}}
{{- end -}}

{{/* 48 characters, which leaves room for the suffixes of the objects' names. */}}
{{- define "warmroute.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 48 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 48 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "warmroute.selectorLabels" -}}
app.kubernetes.io/name: {{ include "warmroute.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of the pod of `helm test`, which must not be one of the routers' pods. */}}
{{- define "warmroute.testLabels" -}}
app.kubernetes.io/name: {{ include "warmroute.name" . }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of every object but the two that select. Those of the chart cannot be replaced: tools find objects by them. */}}
{{- define "warmroute.commonLabels" -}}
{{- $chart := printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" -}}
{{- $own := dict "helm.sh/chart" $chart "app.kubernetes.io/version" .Chart.AppVersion "app.kubernetes.io/part-of" "warmroute"
  "app.kubernetes.io/managed-by" .Release.Service -}}
{{- merge (dict) $own (omit .Values.commonLabels "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component") | toYaml -}}
{{- end -}}

{{- define "warmroute.labels" -}}
{{ include "warmroute.selectorLabels" . }}
{{ include "warmroute.commonLabels" . }}
{{- end -}}

{{/* Labels of the routers' pods: without the chart's version, so that a new chart alone replaces no pod. */}}
{{- define "warmroute.podLabels" -}}
{{- $own := merge (include "warmroute.selectorLabels" . | fromYaml) (dict "app.kubernetes.io/part-of" "warmroute") -}}
{{- merge (dict) $own .Values.podLabels .Values.commonLabels | toYaml -}}
{{- end -}}

{{/* Labels and annotations of an object's metadata. */}}
{{- define "warmroute.metadata" -}}
labels:
  {{- include "warmroute.labels" . | nindent 2 }}
{{- with .Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "warmroute.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "warmroute.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Takes an image's values and the tag that counts where they have none. */}}
{{- define "warmroute.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default (index . 1) $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* A duration such as 1m30s in milliseconds. */}}
{{- define "warmroute.milliseconds" -}}
{{- $factors := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 -}}
{{- $total := 0 -}}
{{- range regexFindAll "[0-9]+(ms|h|m|s)" . -1 -}}
{{- $total = add $total (mul (regexFind "^[0-9]+" . | int64) (get $factors (regexFind "[a-z]+$" .))) -}}
{{- end -}}
{{- $total -}}
{{- end -}}

{{/* A duration in whole seconds, not less than it is. */}}
{{- define "warmroute.seconds" -}}
{{- div (add (include "warmroute.milliseconds" . | int64) 999) 1000 -}}
{{- end -}}

{{/* A duration as Envoy reads it: in seconds alone. */}}
{{- define "warmroute.envoyDuration" -}}
{{- divf (include "warmroute.milliseconds" . | float64) 1000 -}}s
{{- end -}}

{{/* A Kubernetes quantity such as 4Gi, or a number, in bytes. */}}
{{- define "warmroute.bytes" -}}
{{- $factors := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if kindIs "string" . -}}
{{- $factor := get $factors (regexFind "[A-Za-z]*$" .) -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (float64 $factor) | int64 -}}
{{- else -}}
{{- int64 . -}}
{{- end -}}
{{- end -}}

{{/* The port of a URL or ZMQ endpoint; 443 or 80 where a URL names none. */}}
{{- define "warmroute.portOf" -}}
{{- $port := regexFind ":[0-9]+/?$" . | trimPrefix ":" | trimSuffix "/" -}}
{{- if $port -}}{{- $port -}}{{- else -}}{{- hasPrefix "https://" . | ternary 443 80 -}}{{- end -}}
{{- end -}}

{{/*
Where the runbooks are that alerts and dashboards link to: below the repository's address where one is named, else as they lie in it.
*/}}
{{- define "warmroute.runbooks" -}}
{{- with .Values.runbooksUrl }}{{ trimSuffix "/" . }}/{{ end }}docs/runbooks
{{- end }}
