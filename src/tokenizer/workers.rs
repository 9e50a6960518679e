//! The local tokenizer on threads of its own, a few at a time.
//!
//! Tokenizing is computation: on the async threads it would hold up every other request. Whoever finds no thread free
//! waits, as long as its budget lasts, in a short queue: beyond it the answer would come too late, and is refused at
//! once. What has begun is finished and kept, also when nobody waits for it any more.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::local::{LocalStatus, LocalTokenizer};
use super::{Error, Tokens};
use crate::request::Question;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Workers {
    tokenizer: Arc<LocalTokenizer>,
    /// One for each core, so that more of them would not be faster.
    free: Arc<Semaphore>,
    /// Those that run or wait.
    places: Arc<Semaphore>,
}

/// Questions that may run or wait, per thread.
const PLACES_PER_THREAD: usize = 8;

impl Workers {
    pub(super) fn new(tokenizer: Arc<LocalTokenizer>) -> Self {
        let n_cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let [free, places] = [n_cores, n_cores * PLACES_PER_THREAD].map(|n| Arc::new(Semaphore::new(n)));
        Self { tokenizer, free, places }
    }

    /// The tokens of a question, within the budget; `keep` gets them in any case.
    pub(super) async fn tokens(
        &self,
        question: Arc<Question>,
        budget: Duration,
        keep: impl FnOnce(&Arc<Tokens>) + Send + 'static,
    ) -> Result<Arc<Tokens>, Error> {
        let Ok(place) = self.places.clone().try_acquire_owned() else { return Err(Error::Busy) };
        let work = async {
            let permit = self.free.clone().acquire_owned().await.expect("nobody closes the semaphore");
            let tokenizer = self.tokenizer.clone();
            let done = tokio::task::spawn_blocking(move || {
                let tokens = tokenize(&tokenizer, &question).inspect(keep);
                drop((permit, place));
                tokens
            });
            // A panic of the tokenizer costs this answer.
            done.await.unwrap_or(Err(Error::Panicked))
        };
        tokio::time::timeout(budget, work).await.unwrap_or(Err(Error::Budget(budget)))
    }

    /// Does something with the tokens of a question when a thread is free at once; otherwise nothing.
    pub(super) fn in_passing(&self, question: Arc<Question>, use_it: impl FnOnce(&Tokens) + Send + 'static) {
        let Ok(permit) = self.free.clone().try_acquire_owned() else { return };
        let tokenizer = self.tokenizer.clone();
        // Not waited for: it ends by itself.
        drop(tokio::task::spawn_blocking(move || {
            if let Ok(tokens) = tokenize(&tokenizer, &question) {
                use_it(&tokens);
            }
            drop(permit);
        }));
    }

    /// Whether it was found to answer otherwise in parts than as a whole.
    pub(super) fn is_doubted(&self) -> bool {
        self.tokenizer.is_doubted()
    }

    pub(super) fn status(&self) -> LocalStatus {
        self.tokenizer.status()
    }
}

fn tokenize(tokenizer: &LocalTokenizer, question: &Question) -> Result<Arc<Tokens>, Error> {
    let local = tokenizer.tokenize(question).map_err(Error::Unsupported)?;
    Ok(Arc::new(Tokens { ids: local.ids, ..Tokens::default() }))
}
