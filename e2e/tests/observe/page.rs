//! The page at `/` in a real browser, while the router works.

use std::path::Path;
use std::time::Duration;

use e2e::engines::ENGINE_MODEL;
use serde_json::json;

use crate::browser::Browser;
use crate::live::{Live, N_ENGINES};

/// Length of the load before the picture for the docs is taken, so that its plots have something to show.
const SITTING: Duration = Duration::from_secs(75);
const TOKEN: &str = "a-token-for-the-page";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (cargo e2e tools) and Debian's chromium and chromium-driver"]
async fn page_shows_what_the_router_does() {
    let _turn = crate::TURN.lock().await;
    let live = Live::start(&[]).await;
    let browser = Browser::start(live.dir.path()).await;
    browser.open(&live.admin()).await;

    browser.wait("#status", |text| text == "ready").await;
    let endpoints = browser.wait("#endpoints", |text| text.matches("live").count() == N_ENGINES).await;
    for engine in live.engines.http() {
        assert!(endpoints.contains(&engine.to_string()), "{engine} is not in\n{endpoints}");
    }
    let n_decisions = |text: &str| text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    let before = n_decisions(&browser.wait("#tile-rate-more", |text| n_decisions(text) > 0).await);
    browser.wait("#tile-rate-more", |text| n_decisions(text) > before).await;
    browser.wait("#tile-hit", |text| text.ends_with('%') && !text.starts_with("0.0")).await;
    browser.wait("#tile-index-more", |text| text.contains("blocks")).await;
    assert!(browser.count("#plot-decisions path, #plot-decisions polygon").await > 0, "nothing is plotted");

    explain_a_decision(&browser).await;
    make_a_dry_run(&browser).await;

    if std::env::var_os("UPDATE_DOCS").is_some() {
        tokio::time::sleep(SITTING).await;
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/images/page.png");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, browser.screenshot().await).unwrap();
    }
    make_a_dry_run_of_what_is_no_request(&browser).await;
    assert_eq!(browser.complaints().await, [""; 0]);
}

async fn explain_a_decision(browser: &Browser) {
    // A row that is replaced under the mouse takes no click.
    browser.click("#pause").await;
    browser.wait("#status", |text| text.contains("paused")).await;
    let row = "#decisions tbody tr:last-child";
    let pick = browser.text(&format!("{row} td:nth-child(7)")).await.unwrap();
    browser.click(&format!("{row} button")).await;
    let answer = browser.wait("#detail-answer", |text| text.starts_with(&format!("Goes to {pick}"))).await;
    for part in ["Prompt tokens", "Policy", "Took", "In flight", "Runner-up", "What became known later"] {
        assert!(answer.to_lowercase().contains(&part.to_lowercase()), "{part} is not in\n{answer}");
    }
    browser.click("#detail-close").await;
    browser.click("#pause").await;
    browser.wait("#status", |text| text == "ready").await;
}

async fn make_a_dry_run(browser: &Browser) {
    let body = json!({"model": ENGINE_MODEL, "messages": [{"role": "user", "content": "where would this go?"}]});
    browser.enter("#ask-body", &body.to_string()).await;
    browser.click("#ask-send").await;
    let answer = browser.wait("#ask-answer", |text| text.contains("Goes to")).await;
    assert!(browser.count("#ask-answer tbody tr").await == N_ENGINES as u64, "{answer}");
}

async fn make_a_dry_run_of_what_is_no_request(browser: &Browser) {
    browser.enter("#ask-body", "}").await;
    browser.click("#ask-send").await;
    browser.wait("#ask-answer", |text| text.starts_with("Is left to Envoy") && text.contains("cannot be read")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (cargo e2e tools) and Debian's chromium and chromium-driver"]
async fn page_asks_for_the_token_that_the_router_asks_for() {
    let _turn = crate::TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, TOKEN).unwrap();
    let live = Live::start(&[("WARMROUTE_ADMIN_TOKEN_FILE", file.to_str().unwrap())]).await;
    let browser = Browser::start(live.dir.path()).await;
    browser.open(&live.admin()).await;

    browser.wait("#auth", |text| text.contains("asks for a token") && !text.contains("not accepted")).await;
    assert_eq!(browser.count("#endpoints tbody tr").await, 0);
    browser.enter("#auth-token", "another-token").await;
    browser.click("#auth button").await;
    browser.wait("#auth-wrong", |text| text.contains("not accepted")).await;
    browser.enter("#auth-token", TOKEN).await;
    browser.click("#auth button").await;
    browser.wait("#endpoints", |text| text.matches("live").count() == N_ENGINES).await;
    assert_eq!(browser.text("#auth").await, None, "the dialog is gone");

    // The browser reports each 401 that a page gets, and has nothing else to report.
    let complaints = browser.complaints().await;
    assert!(complaints.iter().all(|line| line.contains("/overview") && line.contains("401")), "{complaints:?}");
}
