//! The routers' pods: what they may do, how they stop, and by what they are selected.

use std::fs;

use serde_json::{Value, json};

use super::helm::{FULLNAME, Helm, NAMESPACE, chart, object, of_kind, set, sets};

/// Specification of every pod that a release makes.
fn pod_specs(objects: &[Value]) -> Vec<&Value> {
    let templates = of_kind(objects, "Deployment").map(|deployment| &deployment["spec"]["template"]["spec"]);
    templates.chain(of_kind(objects, "Pod").map(|pod| &pod["spec"])).collect()
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn pods_have_no_rights_on_their_machine() {
    let helm = Helm::get();
    for (name, file) in sets() {
        let objects = helm.template(&file, &[]).unwrap();
        let specs = pod_specs(&objects);
        assert_eq!(specs.len(), 2, "{name}: the Deployment and the pod of helm test");
        for spec in specs {
            let context = &spec["securityContext"];
            assert_eq!((&context["runAsNonRoot"], &context["runAsUser"]), (&json!(true), &json!(65532)), "{name}");
            assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault", "{name}");
            for host in ["hostNetwork", "hostPID", "hostIPC"] {
                assert!(spec[host].is_null(), "{name}: {host}");
            }
            assert_eq!(spec["enableServiceLinks"], false, "{name}: variables of Services would be settings");
            for container in spec["containers"].as_array().unwrap() {
                let context = &container["securityContext"];
                assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
                assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
                assert_eq!(context["capabilities"], json!({"drop": ["ALL"]}), "{name}");
                assert!(container["resources"]["limits"]["memory"].is_string(), "{name}: memory without a limit");
            }
        }
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn pod_lives_longer_than_its_streams() {
    let helm = Helm::get();
    for (settings, seconds, sleep) in [
        (&[][..], 40, 30),
        (&["config.shutdown.grace=1m30s"], 105, 95),
        (&["config.shutdown.grace=1500ms", "config.shutdown.delay=0s"], 12, 2),
        // Kubernetes takes no 0 for the hook.
        (&["config.shutdown.grace=0s", "config.shutdown.delay=0s"], 10, 1),
    ] {
        let objects = helm.template(&set("sidecar"), settings).unwrap();
        let spec = &object(&objects, "Deployment", FULLNAME)["spec"]["template"]["spec"];
        assert_eq!(spec["terminationGracePeriodSeconds"], seconds, "{settings:?}");
        let containers = spec["containers"].as_array().unwrap();
        assert!(containers[0]["lifecycle"].is_null(), "the router needs no hook");
        // Envoy carries the answers and ends at once when it is told to.
        let envoy = containers.iter().find(|container| container["name"] == "envoy").unwrap();
        assert_eq!(envoy["lifecycle"]["preStop"]["sleep"]["seconds"], sleep, "{settings:?}");
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn probes_ask_what_the_router_answers() {
    let objects = Helm::get().template(&set("static"), &[]).unwrap();
    let container = &object(&objects, "Deployment", FULLNAME)["spec"]["template"]["spec"]["containers"][0];
    for (probe, path) in [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
        assert_eq!(container[probe]["httpGet"], json!({"path": path, "port": "http-admin"}), "{probe}");
    }
    let ports: Vec<_> = container["ports"].as_array().unwrap().iter().map(|port| port["name"].clone()).collect();
    assert_eq!(ports, [json!("grpc-extproc"), json!("http-admin")]);
    let service = &object(&objects, "Service", FULLNAME)["spec"]["ports"];
    assert_eq!(service.as_array().unwrap().len(), 1, "the admin port is no part of the Service: {service}");
    assert_eq!(service[0]["appProtocol"], "kubernetes.io/h2c", "gateways would else take it for HTTP/1");
    let headless = &object(&objects, "Service", &format!("{FULLNAME}-headless"))["spec"];
    assert_eq!((&headless["clusterIP"], &headless["ports"][0]["port"]), (&json!("None"), &json!(9090)));
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn a_change_of_the_configuration_replaces_the_pods_and_one_of_the_chart_does_not() {
    let helm = Helm::get();
    let template = |chart: &std::path::Path, settings: &[&str]| {
        let objects = helm.template_of(chart, &set("sidecar"), settings).unwrap();
        object(&objects, "Deployment", FULLNAME)["spec"]["template"].clone()
    };
    let before = template(&chart(), &[]);
    for changed in ["config.shutdown.grace=11s", "envoySidecar.engines.port=8001"] {
        assert_ne!(
            template(&chart(), &[changed])["metadata"]["annotations"],
            before["metadata"]["annotations"],
            "{changed}"
        );
    }
    let newer = newer_chart();
    let pinned = ["image.tag=v1"];
    assert_eq!(template(&newer.path().join("warmroute"), &pinned), template(&chart(), &pinned));
}

/// The chart under a later version.
fn newer_chart() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("cp").arg("-R").arg(chart()).arg(dir.path()).status().unwrap();
    assert!(status.success());
    let path = dir.path().join("warmroute/Chart.yaml");
    let text = fs::read_to_string(&path).unwrap();
    let newer =
        text.replace("version: 0.1.0", "version: 9.0.0").replace("appVersion: \"0.1.0\"", "appVersion: \"9.0.0\"");
    assert_ne!(newer, text);
    fs::write(path, newer).unwrap();
    dir
}

/// Everything by which objects of a release choose pods.
pub(super) fn selectors(objects: &[Value]) -> Vec<(String, Value)> {
    let pointers = ["/spec/selector", "/spec/podSelector", "/spec/template/spec/topologySpreadConstraints"];
    let of_object = |object: &Value| {
        let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
        pointers
            .iter()
            .filter_map(|pointer| Some((format!("{name} {pointer}"), object.pointer(pointer)?.clone())))
            .collect::<Vec<_>>()
    };
    objects.iter().flat_map(of_object).collect()
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn no_upgrade_changes_what_is_selected() {
    let helm = Helm::get();
    let newer = newer_chart();
    let changed = ["replicas=5", "image.tag=v2", "commonLabels.team=b", "podLabels.tier=c", "config.log.filter=debug"];
    for (name, file) in sets() {
        let before = selectors(&helm.template(&file, &[]).unwrap());
        let after = selectors(&helm.template_of(&newer.path().join("warmroute"), &file, &changed).unwrap());
        assert_eq!(before, after, "{name}");
        assert!(before.len() >= 5, "{name}: Deployment, spread, two Services, budget: {before:?}");
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn selectors_find_the_routers_and_not_the_pod_of_helm_test() {
    let helm = Helm::get();
    for (name, file) in sets() {
        let settings =
            ["podLabels.app\\.kubernetes\\.io/name=other", "commonLabels.app\\.kubernetes\\.io/instance=other"];
        let objects = helm.template(&file, &settings).unwrap();
        let deployment = of_kind(&objects, "Deployment").next().unwrap();
        let chosen = deployment["spec"]["selector"]["matchLabels"].as_object().unwrap();
        let fits = |labels: &Value| chosen.iter().all(|(label, value)| labels[label] == *value);
        assert!(fits(&deployment["spec"]["template"]["metadata"]["labels"]), "{name}: labels of the user's go last");
        assert!(!fits(&of_kind(&objects, "Pod").next().unwrap()["metadata"]["labels"]), "{name}");
        assert_eq!(deployment["metadata"]["namespace"], NAMESPACE);
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn snapshots_have_a_volume_where_the_configuration_wants_them() {
    let helm = Helm::get();
    let spec = |settings: &[&str]| {
        let objects = helm.template(&set("static"), settings).unwrap();
        object(&objects, "Deployment", FULLNAME)["spec"]["template"]["spec"].clone()
    };
    assert_eq!(spec(&[])["volumes"].as_array().unwrap().len(), 1, "the configuration alone");
    let with = spec(&["config.events.snapshots.dir=/var/lib/warmroute"]);
    assert!(
        with["volumes"].as_array().unwrap().contains(&json!({"name": "snapshots", "emptyDir": {"sizeLimit": "2Gi"}}))
    );
    let mounts = with["containers"][0]["volumeMounts"].as_array().unwrap();
    assert!(mounts.contains(&json!({"name": "snapshots", "mountPath": "/var/lib/warmroute"})), "{mounts:?}");
}
