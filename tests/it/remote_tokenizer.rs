//! The remote tokenizer against stubs on real ports: hedges, breakers, caps, cancellation, the canary, and its own
//! endpoint.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};
use warmroute::engine::{Access, EngineClient};
use warmroute::request::{Question, TokensApi};
use warmroute::tokenizer::remote::{BreakerState, Call, Failure, RemoteConfig, RemoteTokenizer, Targets};
use warmroute::tokenizer::{Budget, Error};

use crate::fakes::{DEADLINE, eventually, remote_tokenizer};
use crate::tokenizer_stub::{Reply, Stub};

/// A budget that no test uses up.
const AMPLE: Duration = Duration::from_secs(3_600);
/// A budget that is used up soon.
const SHORT: Duration = Duration::from_millis(500);

fn tokenizer(budget: Duration) -> Arc<RemoteTokenizer> {
    remote_tokenizer(&Access::default(), budget)
}

fn targets(first: SocketAddr, hedge: Option<SocketAddr>) -> Targets {
    Targets { first: Some(first), hedge }
}

fn ask(tokenizer: &Arc<RemoteTokenizer>, targets: Targets) -> Call {
    ask_api(tokenizer, TokensApi::Tokenize, targets)
}

fn ask_api(tokenizer: &Arc<RemoteTokenizer>, api: TokensApi, targets: Targets) -> Call {
    let question = Question { api, body: br#"{"prompt":"ask"}"#.to_vec() };
    tokenizer.ask(Arc::new(question), targets)
}

/// The end of a call that is awaited until it ends.
async fn end(call: Call) -> Result<Vec<u32>, Error> {
    let ended = tokio::time::timeout(DEADLINE, call).await.expect("an end within the deadline");
    ended.map(|tokens| tokens.ids)
}

/// Gives a call up as overdue once its question is on its way.
async fn wait_in_vain(mut call: Call, stub: &Stub) -> Call {
    let n_asked = stub.n_asked();
    let sent = eventually("the question", || stub.n_asked() > n_asked);
    tokio::select! {
        ended = &mut call => panic!("expected no answer, found {ended:?}"),
        () = sent => {}
    }
    call.overdue();
    call
}

fn state(tokenizer: &RemoteTokenizer, endpoint: SocketAddr) -> Option<BreakerState> {
    let endpoints = tokenizer.status().endpoints;
    endpoints.iter().find(|status| status.target == endpoint.into()).map(|status| status.state)
}

fn n_failures(tokenizer: &RemoteTokenizer, failure: Failure) -> u64 {
    tokenizer.status().failures.iter().find(|(counted, _)| *counted == failure).unwrap().1
}

/// An address at which nobody listens.
fn unreachable() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Lets the checks run over a list of endpoints that may be changed, until it is dropped.
struct Checks {
    listed: Arc<Mutex<Vec<SocketAddr>>>,
    _shutdown: DropGuard,
}

impl Checks {
    fn start(tokenizer: &Arc<RemoteTokenizer>, stubs: &[&Stub]) -> Self {
        let listed = Arc::new(Mutex::new(stubs.iter().map(|stub| stub.address).collect::<Vec<_>>()));
        let shutdown = CancellationToken::new();
        let endpoints = listed.clone();
        let list = move || endpoints.lock().unwrap().clone();
        tokio::spawn(tokenizer.clone().run(list, shutdown.clone()));
        Self { listed, _shutdown: shutdown.drop_guard() }
    }
}

#[tokio::test]
async fn the_second_answers_for_a_slow_first() {
    let (slow, quick) = (Stub::start(Reply::Silence).await, Stub::start(Reply::Ids(&[1, 2])).await);
    let tokenizer = tokenizer(Duration::from_secs(1));
    let both = targets(slow.address, Some(quick.address));
    assert_eq!(end(ask(&tokenizer, both)).await.unwrap(), [1, 2]);
    eventually("the end of the slow call", || slow.n_given_up() == 1).await;
    let status = tokenizer.status();
    assert_eq!((status.n_calls, status.n_hedges, status.n_hedge_wins, status.n_cancelled), (1, 1, 1, 0));
    assert_eq!(n_failures(&tokenizer, Failure::Outrun), 1, "the first could not answer within half the budget");
    for _ in 0..2 {
        end(ask(&tokenizer, both)).await.unwrap();
    }
    assert!(!tokenizer.may_ask(slow.address) && tokenizer.may_ask(quick.address));
    assert_eq!(end(ask(&tokenizer, both)).await.unwrap(), [1, 2], "who is open is passed over");
    assert_eq!((slow.n_asked(), quick.n_asked()), (3, 4));
    assert_eq!(tokenizer.status().n_hedges, 3);
}

#[tokio::test]
async fn the_first_answers_before_anyone_else_is_asked() {
    let (first, second) = (Stub::start(Reply::Ids(&[1])).await, Stub::start(Reply::Ids(&[2])).await);
    let tokenizer = tokenizer(AMPLE);
    assert_eq!(end(ask(&tokenizer, targets(first.address, Some(second.address)))).await.unwrap(), [1]);
    assert_eq!((first.asked(), second.n_asked(), tokenizer.status().n_hedges), (vec!["/tokenize".to_owned()], 0, 0));
}

#[tokio::test]
async fn whoever_fails_at_once_has_the_second_asked_at_once() {
    let quick = Stub::start(Reply::Ids(&[1])).await;
    for reply in [None, Some(Reply::Status(500)), Some(Reply::Status(404)), Some(Reply::HangUp), Some(Reply::Text("?"))]
    {
        let first = match &reply {
            Some(reply) => Some(Stub::start(reply.clone()).await),
            None => None,
        };
        let address = first.as_ref().map_or_else(unreachable, |stub| stub.address);
        // Half of this budget would be beyond the deadline.
        let tokens = end(ask(&tokenizer(AMPLE), targets(address, Some(quick.address)))).await;
        assert_eq!(tokens.unwrap(), [1], "{reply:?}");
    }
}

#[tokio::test]
async fn a_wrong_question_opens_nothing() {
    for (status, n_second) in [(400, 0), (413, 0), (422, 0), (404, 9)] {
        let [first, second] = [Stub::start(Reply::Status(status)).await, Stub::start(Reply::Status(status)).await];
        let tokenizer = tokenizer(AMPLE);
        for _ in 0..9 {
            let error = end(ask(&tokenizer, targets(first.address, Some(second.address)))).await.unwrap_err();
            assert_eq!(error.as_str(), "tokenizer_status", "{status}");
        }
        assert!(tokenizer.may_ask(first.address) && tokenizer.may_ask(second.address), "{status}");
        assert_eq!((first.n_asked(), second.n_asked()), (9, n_second), "only another's adapters may be others");
    }
}

#[tokio::test]
async fn the_third_failure_opens_and_then_nothing_is_asked() {
    for (reply, failure, name) in [
        (Reply::Status(500), Failure::Status, "tokenizer_status"),
        (Reply::Status(401), Failure::Status, "tokenizer_status"),
        (Reply::Text("nonsense"), Failure::Nonsense, "tokenizer_nonsense"),
        (Reply::Text(r#"{"count":2,"tokens":[1]}"#), Failure::Nonsense, "tokenizer_nonsense"),
        (Reply::Endless, Failure::TooLarge, "tokenizer_too_large"),
        (Reply::HangUp, Failure::Unreachable, "tokenizer_unreachable"),
    ] {
        let stub = Stub::start(reply.clone()).await;
        let tokenizer = tokenizer(AMPLE);
        for n in 1..=3 {
            assert!(tokenizer.may_ask(stub.address), "{reply:?}");
            let error = end(ask(&tokenizer, targets(stub.address, None))).await.unwrap_err();
            assert_eq!((error.as_str(), n_failures(&tokenizer, failure)), (name, n), "{reply:?}");
        }
        assert!(!tokenizer.may_ask(stub.address), "{reply:?}");
        let refused = end(ask(&tokenizer, targets(stub.address, None))).await;
        assert!(matches!(refused, Err(Error::Open)), "{refused:?}");
        let refused = end(ask(&tokenizer, Targets::default())).await;
        assert!(matches!(refused, Err(Error::Open)), "nobody is named because nobody may be asked: {refused:?}");
        assert_eq!(stub.n_asked(), 3, "{reply:?}");
    }
}

#[tokio::test]
async fn overdue_answers_open_and_still_arrive() {
    let stub = Stub::start(Reply::Silence).await;
    let tokenizer = tokenizer(AMPLE);
    let mut late = Vec::new();
    for _ in 0..3 {
        assert!(tokenizer.may_ask(stub.address));
        late.push(wait_in_vain(ask(&tokenizer, targets(stub.address, None)), &stub).await);
    }
    assert!(!tokenizer.may_ask(stub.address));
    stub.set_requests(Reply::Ids(&[1, 2, 3]));
    for call in late {
        assert_eq!(end(call).await.unwrap(), [1, 2, 3]);
    }
    assert!(!tokenizer.may_ask(stub.address), "what was asked before it opened tells nothing new");
    let status = tokenizer.status();
    assert_eq!((status.n_late, status.n_cancelled, status.endpoints[0].n_in_flight), (3, 0, 0));
    assert_eq!(n_failures(&tokenizer, Failure::Overdue), 3);
}

#[tokio::test]
async fn silence_ends_at_the_hard_deadline() {
    let [first, second] = [Stub::start(Reply::Silence).await, Stub::start(Reply::Silence).await];
    let tokenizer = tokenizer(SHORT);
    let ended = end(ask(&tokenizer, targets(first.address, Some(second.address)))).await;
    // The question has 16 bytes, each of which adds a microsecond, but never beyond the greatest budget.
    assert!(matches!(ended, Err(Error::Budget(after)) if after == SHORT * 4), "{ended:?}");
    eventually("the end of both calls", || first.n_given_up() == 1 && second.n_given_up() == 1).await;
    assert_eq!(n_failures(&tokenizer, Failure::Overdue), 2);
    assert!(tokenizer.status().endpoints.iter().all(|status| status.n_in_flight == 0));
}

#[tokio::test]
async fn a_dropped_call_closes_its_connections_and_is_no_failure() {
    let [first, second] = [Stub::start(Reply::Silence).await, Stub::start(Reply::Silence).await];
    let tokenizer = tokenizer(Duration::from_secs(2));
    let mut call = ask(&tokenizer, targets(first.address, Some(second.address)));
    let sent = eventually("both questions", || first.n_asked() == 1 && second.n_asked() == 1);
    tokio::select! {
        ended = &mut call => panic!("expected no answer, found {ended:?}"),
        () = sent => {}
    }
    assert!(tokenizer.status().endpoints.iter().all(|status| status.n_in_flight == 1));
    drop(call);
    eventually("the end of both connections", || first.n_given_up() == 1 && second.n_given_up() == 1).await;
    let status = tokenizer.status();
    assert_eq!(status.n_cancelled, 1);
    assert!(status.failures.iter().all(|(_, n)| *n == 0), "{status:?}");
    assert!(status.endpoints.iter().all(|status| (status.n_in_flight, status.n_failures) == (0, 0)), "{status:?}");
}

#[tokio::test]
async fn an_endpoint_has_eight_calls_and_the_whole_128() {
    let stubs = futures_util::future::join_all((0..17).map(|_| Stub::start(Reply::Silence))).await;
    let tokenizer = tokenizer(AMPLE);
    let of = |stub: &Stub| targets(stub.address, None);
    let mut held: Vec<Call> = (0..8).map(|_| ask(&tokenizer, of(&stubs[0]))).collect();
    assert!(matches!(end(ask(&tokenizer, of(&stubs[0]))).await, Err(Error::Busy)));
    held.push(ask(&tokenizer, targets(stubs[0].address, Some(stubs[1].address))));
    assert_eq!(tokenizer.status().n_calls, 9, "the second is asked in the place of a first that has no room");
    held.extend((0..7).map(|_| ask(&tokenizer, of(&stubs[1]))));
    held.extend(stubs[2..16].iter().flat_map(|stub| (0..8).map(|_| ask(&tokenizer, of(stub)))));
    assert_eq!(held.len(), 128);
    assert!(
        matches!(end(ask(&tokenizer, of(&stubs[16]))).await, Err(Error::Busy)),
        "it has no calls, the others have all"
    );
    held.pop();
    stubs[16].set_requests(Reply::Ids(&[1]));
    assert_eq!(end(ask(&tokenizer, of(&stubs[16]))).await.unwrap(), [1]);
    assert!(!tokenizer.may_ask(stubs[0].address) && tokenizer.may_ask(stubs[16].address), "only one has room");
    assert_eq!(state(&tokenizer, stubs[0].address), Some(BreakerState::Closed), "to be busy is no failure");
    let nobody = end(ask(&tokenizer, Targets::default())).await;
    assert!(matches!(nobody, Err(Error::Busy)), "nobody is named because all who might be have no room: {nobody:?}");
    drop(held);
    assert!(tokenizer.may_ask(stubs[0].address));
}

#[tokio::test]
async fn a_full_endpoint_is_told_from_its_idle_neighbours() {
    let [full, idle] = [Stub::start(Reply::Silence).await, Stub::start(Reply::Silence).await];
    let tokenizer = tokenizer(AMPLE);
    let mut held: Vec<Call> = (0..7).map(|_| ask(&tokenizer, targets(full.address, None))).collect();
    assert!(tokenizer.may_ask(full.address));
    held.push(ask(&tokenizer, targets(full.address, None)));
    assert!(!tokenizer.may_ask(full.address) && tokenizer.may_ask(idle.address));
    held.push(ask(&tokenizer, targets(idle.address, None)));
    held.remove(0);
    assert!(tokenizer.may_ask(full.address), "with as many calls as one may have, but not all its own");
}

#[tokio::test]
async fn a_question_too_large_for_any_budget_is_nobodys_failure() {
    let [first, second] = [Stub::start(Reply::Silence).await, Stub::start(Reply::Silence).await];
    let tokenizer = tokenizer(Duration::from_millis(300));
    let large = |targets| {
        // 400 ms.
        let body = vec![b' '; 400_000];
        tokenizer.ask(Arc::new(Question { api: TokensApi::Tokenize, body }), targets)
    };
    let ended = end(large(targets(first.address, Some(second.address)))).await;
    assert!(matches!(ended, Err(Error::Budget(_))), "{ended:?}");
    for _ in 0..2 {
        drop(wait_in_vain(large(targets(first.address, None)), &first).await);
    }
    let status = tokenizer.status();
    assert_eq!((first.n_asked(), second.n_asked(), status.n_hedges), (3, 0, 0));
    assert_eq!((n_failures(&tokenizer, Failure::Overdue), status.endpoints[0].n_failures), (3, 0));
    assert!(tokenizer.may_ask(first.address), "for all others it is as good as ever");
    // One that fails is another matter.
    first.set_requests(Reply::Status(500));
    second.set_requests(Reply::Ids(&[1]));
    assert_eq!(end(large(targets(first.address, Some(second.address)))).await.unwrap(), [1]);
    assert_eq!(tokenizer.status().endpoints.iter().map(|status| status.n_failures).sum::<u64>(), 1);
}

#[tokio::test]
async fn a_check_off_the_request_path_closes_it_again() {
    let stub = Stub::start_with(Reply::Status(503), Reply::Ids(&[7])).await;
    let tokenizer = tokenizer(AMPLE);
    let _checks = Checks::start(&tokenizer, &[&stub]);
    eventually("the first check", || stub.n_checks() == 1).await;
    stub.set_checks(Reply::Silence);
    for _ in 0..3 {
        end(ask(&tokenizer, targets(stub.address, None))).await.unwrap_err();
    }
    eventually("half-open", || state(&tokenizer, stub.address) == Some(BreakerState::HalfOpen)).await;
    assert!(!tokenizer.may_ask(stub.address));
    assert!(matches!(end(ask(&tokenizer, targets(stub.address, None))).await, Err(Error::Open)));
    stub.set_requests(Reply::Ids(&[1]));
    stub.set_checks(Reply::Ids(&[7]));
    eventually("closed", || tokenizer.may_ask(stub.address)).await;
    assert_eq!(stub.n_asked(), 3, "no request was spent on finding out");
    assert_eq!(end(ask(&tokenizer, targets(stub.address, None))).await.unwrap(), [1]);
    assert_eq!(state(&tokenizer, stub.address), Some(BreakerState::Closed));
}

#[tokio::test]
async fn an_endpoint_without_the_api_is_found_out_before_requests_do() {
    let (bare, good) = (Stub::start_with(Reply::Silence, Reply::Status(404)).await, Stub::start(Reply::Silence).await);
    let tokenizer = tokenizer(AMPLE);
    let _checks = Checks::start(&tokenizer, &[&bare, &good]);
    eventually("open", || !tokenizer.may_ask(bare.address)).await;
    assert!(tokenizer.may_ask(good.address));
    assert_eq!((bare.n_asked(), tokenizer.status().n_failed_checks >= 3), (0, true));
}

#[tokio::test]
async fn the_api_that_requests_ask_is_the_one_that_is_checked() {
    const RENDERED: Reply = Reply::Text(r#"[{"token_ids":[7]}]"#);
    let stub = Stub::start_with(Reply::Status(403), Reply::Status(403)).await;
    let tokenizer = tokenizer(AMPLE);
    for _ in 0..3 {
        end(ask_api(&tokenizer, TokensApi::RenderChat, targets(stub.address, None))).await.unwrap_err();
    }
    let _checks = Checks::start(&tokenizer, &[&stub]);
    eventually("a check", || stub.n_checks() > 1).await;
    assert!(!tokenizer.may_ask(stub.address), "render APIs that are turned off stay unasked");
    stub.set_checks(RENDERED);
    eventually("closed", || tokenizer.may_ask(stub.address)).await;
    assert!(stub.checked().iter().all(|path| path == "/v1/completions/render"), "{:?}", stub.checked());
}

#[tokio::test]
async fn who_was_asked_in_the_last_moment_is_not_blamed() {
    let [first, second] = [Stub::start(Reply::Silence).await, Stub::start(Reply::Silence).await];
    let tokenizer = tokenizer(AMPLE);
    let mut call = ask(&tokenizer, targets(first.address, Some(second.address)));
    let waited = eventually("the first question", || first.n_asked() == 1);
    tokio::select! {
        ended = &mut call => panic!("expected no answer, found {ended:?}"),
        () = waited => {}
    }
    // A wait of which what follows is a small part.
    tokio::time::sleep(Duration::from_secs(2)).await;
    first.set_requests(Reply::HangUp);
    wait_in_vain(call, &second).await;
    assert_eq!((n_failures(&tokenizer, Failure::Unreachable), n_failures(&tokenizer, Failure::Overdue)), (1, 0));
}

#[tokio::test]
async fn who_makes_other_tokens_than_the_pool_is_not_asked_until_it_agrees() {
    let ours = [Stub::start(Reply::Ids(&[1])).await, Stub::start(Reply::Ids(&[1])).await];
    let other = Stub::start_with(Reply::Ids(&[9]), Reply::Ids(&[8])).await;
    let tokenizer = tokenizer(AMPLE);
    let early = ask(&tokenizer, targets(other.address, None));
    let _checks = Checks::start(&tokenizer, &[&ours[0], &other, &ours[1]]);
    eventually("the canary's verdict", || state(&tokenizer, other.address) == Some(BreakerState::Differs)).await;
    assert!(!tokenizer.may_ask(other.address) && ours.iter().all(|stub| tokenizer.may_ask(stub.address)));
    assert!(matches!(end(early).await, Err(Error::Differs)), "what it was asked before is not believed either");
    assert!(!tokenizer.status().is_split);
    assert_eq!(tokenizer.epoch(), 1, "what it has said before is to be forgotten");

    other.set_checks(Reply::Ids(&[7]));
    eventually("agreement", || tokenizer.may_ask(other.address)).await;
    assert_eq!(end(ask(&tokenizer, targets(other.address, None))).await.unwrap(), [9]);
    assert_eq!(tokenizer.epoch(), 1, "to agree is no reason to forget");
}

#[tokio::test]
async fn who_is_gone_has_no_vote_on_what_the_others_tokens_are() {
    let gone = [Stub::start_with(Reply::HangUp, Reply::Ids(&[8])).await, Stub::start(Reply::HangUp).await];
    gone[1].set_checks(Reply::Ids(&[8]));
    let ours = [Stub::start(Reply::Ids(&[1])).await, Stub::start(Reply::Ids(&[1])).await];
    let tokenizer = tokenizer(AMPLE);
    let checks = Checks::start(&tokenizer, &[&gone[0], &gone[1]]);
    eventually("both checks", || gone.iter().all(|stub| stub.n_checks() > 0)).await;
    gone.iter().for_each(|stub| stub.set_checks(Reply::HangUp));
    for stub in gone.iter().flat_map(|stub| [stub; 3]) {
        end(ask(&tokenizer, targets(stub.address, None))).await.unwrap_err();
    }
    checks.listed.lock().unwrap().extend([ours[0].address, ours[1].address]);
    let wrong = Stub::start_with(Reply::Ids(&[9]), Reply::Ids(&[8])).await;
    checks.listed.lock().unwrap().push(wrong.address);
    eventually("the verdict of those that answer", || state(&tokenizer, wrong.address) == Some(BreakerState::Differs))
        .await;
    assert!(ours.iter().all(|stub| tokenizer.may_ask(stub.address)));
    assert_eq!(tokenizer.epoch(), 1);
}

#[tokio::test]
async fn a_failure_does_not_bring_back_who_differs() {
    let ours = [Stub::start(Reply::HangUp).await, Stub::start(Reply::HangUp).await];
    let other = Stub::start_with(Reply::Ids(&[9]), Reply::Ids(&[8])).await;
    let tokenizer = tokenizer(AMPLE);
    let _checks = Checks::start(&tokenizer, &[&ours[0], &other, &ours[1]]);
    eventually("the canary's verdict", || state(&tokenizer, other.address) == Some(BreakerState::Differs)).await;
    for (stub, n_voters) in ours.iter().zip([2, 1]) {
        stub.set_checks(Reply::HangUp);
        for _ in 0..3 {
            end(ask(&tokenizer, targets(stub.address, None))).await.unwrap_err();
        }
        let n_checks = stub.n_checks();
        // A failed check ends a round, whose verdict precedes the next check.
        eventually("rounds without it", || stub.n_checks() > n_checks + 1).await;
        assert_eq!(state(&tokenizer, other.address), Some(BreakerState::Differs), "{n_voters} vote");
    }
    assert_eq!(tokenizer.epoch(), 1);
}

#[tokio::test]
async fn without_a_majority_nobody_is_excluded() {
    let [one, another] = [7, 8].map(|id| Reply::Ids(if id == 7 { &[7] } else { &[8] }));
    let first = Stub::start_with(Reply::Silence, one).await;
    let (second, third) =
        (Stub::start_with(Reply::Silence, another.clone()).await, Stub::start_with(Reply::Silence, another).await);
    let tokenizer = tokenizer(AMPLE);
    let checks = Checks::start(&tokenizer, &[&first, &second]);
    eventually("the canary's verdict", || tokenizer.status().is_split).await;
    assert!(tokenizer.may_ask(first.address) && tokenizer.may_ask(second.address));
    checks.listed.lock().unwrap().push(third.address);
    eventually("a majority", || state(&tokenizer, first.address) == Some(BreakerState::Differs)).await;
    eventually("agreement", || !tokenizer.status().is_split).await;
    checks.listed.lock().unwrap().retain(|address| *address == first.address);
    eventually("the others' end", || tokenizer.status().endpoints.len() == 1).await;
    eventually("the end of the disagreement", || tokenizer.may_ask(first.address)).await;
}

#[tokio::test]
async fn who_has_left_the_pool_is_forgotten() {
    let stub = Stub::start_with(Reply::Status(500), Reply::Status(500)).await;
    let tokenizer = tokenizer(AMPLE);
    let checks = Checks::start(&tokenizer, &[&stub]);
    eventually("open", || !tokenizer.may_ask(stub.address)).await;
    checks.listed.lock().unwrap().clear();
    eventually("its end", || tokenizer.status().endpoints.is_empty()).await;
    assert!(tokenizer.may_ask(stub.address));
    assert!(matches!(end(ask(&tokenizer, Targets::default())).await, Err(Error::NoEndpoint)));
    stub.set_checks(Reply::Ids(&[7]));
    stub.set_requests(Reply::Ids(&[1]));
    checks.listed.lock().unwrap().push(stub.address);
    eventually("its return", || state(&tokenizer, stub.address) == Some(BreakerState::Closed)).await;
    assert_eq!(end(ask(&tokenizer, targets(stub.address, None))).await.unwrap(), [1]);
}

#[tokio::test]
async fn an_endpoint_of_its_own_takes_the_pools_place() {
    let (own, pool) = (Stub::start(Reply::Ids(&[1])).await, Stub::start(Reply::Ids(&[2])).await);
    let endpoint = format!("http://localhost:{}/prefix/", own.address.port()).parse().unwrap();
    let config = RemoteConfig { budget: Budget { base: AMPLE, max: AMPLE }, endpoint: Some(endpoint) };
    let tokenizer = Arc::new(RemoteTokenizer::new(EngineClient::new(&Access::default()).unwrap(), config));
    assert!(tokenizer.has_own_endpoint());
    let _checks = Checks::start(&tokenizer, &[&pool]);
    eventually("a check", || own.n_checks() > 0).await;
    for named in [Targets::default(), targets(pool.address, Some(pool.address))] {
        assert_eq!(end(ask(&tokenizer, named)).await.unwrap(), [1]);
    }
    assert_eq!(own.asked(), ["/prefix/tokenize", "/prefix/tokenize"]);
    own.set_checks(Reply::Status(500));
    own.set_requests(Reply::Status(500));
    for _ in 0..3 {
        end(ask(&tokenizer, targets(pool.address, None))).await.unwrap_err();
    }
    assert!(matches!(end(ask(&tokenizer, Targets::default())).await, Err(Error::Open)));
    own.set_checks(Reply::Ids(&[7]));
    eventually("closed", || tokenizer.status().endpoints[0].state == BreakerState::Closed).await;
    assert_eq!((pool.n_asked(), pool.n_checks()), (0, 0));
}
